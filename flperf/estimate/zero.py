"""Formulas for ZeRO by stage: the bytes that a process holds, and the bytes that it sends for one update.

They describe DeepSpeed 0.19 with flperf's options; `tests/integration/test_zero_stages.py` compares them with real
runs. They differ from Rajbhandari et al. (arXiv:1910.02054, section 7: 2 Psi at stages 0 to 2, 3 Psi at stage 3, for
Psi parameters and many processes) in two points:
- Stages 1 and 2 send 3 Psi, because they all-reduce the gradients instead of reduce-scattering them
  (`use_multi_rank_bucket_allreduce`, on by default).
- Stage 3 sends 2 Psi, because it keeps the gathered weights from the forward to the backward pass unless they have more
  than 1e9 elements.
"""

from dataclasses import dataclass

from flperf.engine.engine import REDUCE_BUCKET

LIVE_PARAMETERS = 1_000_000_000  # elements of gathered weights that stage 3 keeps, DeepSpeed's default
MASTER = 4  # bytes of an fp32 element: master weights, each moment, the moving average, accumulated gradients


@dataclass(frozen=True)
class States:
    """Bytes of model states on one process, without padding (some elements per tensor)."""

    weights: float
    gathered: float  # whole weights while stage 3 computes
    gradients: float  # when the optimizer steps, which is their peak
    buckets: float  # buffers that collect gradients during the backward pass
    master: float
    moments: float
    average: float

    @property
    def total(self) -> float:
        return self.weights + self.gathered + self.gradients + self.buckets + self.optimizer

    @property
    def optimizer(self) -> float:
        """The states that ZeRO shards from stage 1 on: proportional to 1 / processes."""
        return self.master + self.moments + self.average


def model_states(
    parameters: int,
    stage: int,
    processes: int,
    element_bytes: int,
    *,
    average: bool,
    accumulates: bool = False,
    overlaps: bool = True,
) -> States:
    """element_bytes: of the compute dtype. average: a moving average is kept. accumulates: an update has several
    micro-batches. overlaps: gradients are sent during the backward pass, from two buckets in turn; flperf does so on
    GPUs."""
    shard = parameters / (processes if stage > 0 else 1)
    bare = stage == 0 and element_bytes == MASTER  # the weights are their own master weights
    # DeepSpeed then uses its BF16_Optimizer, which has no buckets.
    wrapped = stage == 1 and accumulates and element_bytes < MASTER
    return States(
        weights=element_bytes * (shard if stage == 3 else parameters),
        gathered=element_bytes * min(parameters, LIVE_PARAMETERS) if stage == 3 else 0,
        gradients=_gradients(parameters, shard, stage, element_bytes, accumulates),
        buckets=0
        if stage == 0 or wrapped
        else element_bytes * min(parameters, REDUCE_BUCKET) * (2 if overlaps and stage < 3 else 1),
        master=0 if bare else MASTER * shard,
        moments=2 * MASTER * shard,
        average=MASTER * shard if average else 0,
    )


def _gradients(parameters: int, shard: float, stage: int, element_bytes: int, accumulates: bool) -> float:
    low = element_bytes < MASTER
    if stage == 0 or (stage == 1 and accumulates and low):
        return parameters * (element_bytes + (MASTER if low else 0))
    if stage == 2 and accumulates and low:  # the optimizer steps with the fp32 sums
        return shard * MASTER
    return shard * ((MASTER if accumulates else element_bytes) + MASTER)


@dataclass(frozen=True)
class Collective:
    """message: bytes of the whole tensor. hidden: sent during computation (`overlap_comm`)."""

    kind: str
    message: float
    hidden: bool

    def sent(self, processes: int) -> float:
        """Bytes that each process sends in a ring. An all-reduce passes it twice (Patarasuk and Yuan, 2009)."""
        rounds = 2 if self.kind == "all_reduce" else 1
        return rounds * self.message * (processes - 1) / processes


def collectives(parameters: int, stage: int, element_bytes: int, accumulation_steps: int = 1) -> list[Collective]:
    """The collectives of one update, in the compute dtype, without norms, overflow flags and padding (a few dozen bytes
    each)."""
    message = parameters * element_bytes
    if stage == 0:
        return [Collective("all_reduce", message, hidden=False)]
    if stage == 3:
        gathered_twice = parameters > LIVE_PARAMETERS
        return [
            Collective("all_gather", message * accumulation_steps * (2 if gathered_twice else 1), hidden=True),
            Collective("reduce_scatter", message * accumulation_steps, hidden=True),
        ]
    once = stage == 1  # stage 2 keeps only a shard of the gradients, so it reduces those of every micro-batch
    wrapped = once and accumulation_steps > 1 and element_bytes < MASTER
    return [
        Collective("all_reduce", message * (1 if once else accumulation_steps), hidden=not wrapped),
        Collective("all_gather", message, hidden=False),
    ]
