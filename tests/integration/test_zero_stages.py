"""ZeRO stages: all train alike at any number of processes, and send and hold what the formulas say."""

import itertools

import pytest
import torch
from ranks.curves import curves
from ranks.zero import measure_all
from runs import REGIMES
from worlds import run_world

from flperf.config import load_config
from flperf.engine.devices import DEVICES
from flperf.estimate.memory import device_memory
from flperf.estimate.workload import build_workload
from flperf.estimate.zero import Collective, collectives, model_states

BYTES = {"bf16": 2, "fp32": 4}
STAGES = (0, 1, 2, 3)
WIDE = ["model.hidden_dim=320"]  # its matrices are above the 1e5 elements below which ZeRO 3 leaves a parameter whole
# What makes DeepSpeed 0.19 send what the paper says. ZeRO 3: release and gather whatever is not in use.
TEXTBOOK = {
    1: {"use_multi_rank_bucket_allreduce": False},
    2: {"use_multi_rank_bucket_allreduce": False},
    3: {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0, "stage3_param_persistence_threshold": 0},
}
# Psi a process and update, for many processes (Rajbhandari et al., arXiv:1910.02054, section 7).
TEXTBOOK_VOLUME = {1: 2, 2: 2, 3: 3}


@pytest.fixture(scope="module")
def trained(tiny) -> dict[str, dict]:
    """Every regime at every stage in fp32 and bf16, and with two micro-batches, on two processes."""
    requests = {
        f"{regime}-{precision}-{stage}": [
            *REGIMES[regime],
            f"engine.precision={precision}",
            f"engine.zero_stage={stage}",
        ]
        for regime, precision, stage in itertools.product(REGIMES, BYTES, STAGES)
    }
    requests |= {
        f"{regime}-accumulated": [*REGIMES[regime], "trainer.micro_batch_size=1", "engine.zero_stage=2"]
        for regime in REGIMES
    }
    return run_world(2, curves, str(tiny), requests)[0]


@pytest.fixture(scope="module")
def alone(tiny) -> dict[str, dict]:
    """Every regime on one process."""
    return run_world(1, curves, str(tiny), {f"{regime}-alone": overrides for regime, overrides in REGIMES.items()})[0]


@pytest.mark.parametrize("regime", REGIMES)
def test_stages_train_alike_in_fp32(trained, regime):
    """The stages differ in the order of sums alone. Each fp32 sum over at most 2^17 gradients errs by less than 2^-24
    * 17 relatively (pairwise), and four updates at a rate of 1e-3 carry that on by less than a factor of ten:
    1e-5."""
    first, *others = (trained[f"{regime}-fp32-{stage}"] for stage in STAGES)
    assert len(first["loss"]) == len(first["seen"]) == 4
    for other in others:
        assert other["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
        assert other["seen"] == first["seen"]


@pytest.mark.parametrize("regime", REGIMES)
def test_stages_train_alike_in_bf16(trained, regime):
    """Gradients are averaged in bf16, so each errs by up to 2^-8 relatively; an update moves a weight by at most the
    rate 1e-3 (Adam), and the loss by at most grad_norm * |update| of it: sum over the updates of 2^-8 * grad_norm *
    1e-3 * sqrt(parameters)."""
    reference, parameters = trained[f"{regime}-bf16-0"], 60_000
    bound = sum(2**-8 * norm * 1e-3 * parameters**0.5 for norm in reference["grad_norm"])
    for stage in STAGES[1:]:
        assert trained[f"{regime}-bf16-{stage}"]["loss"] == pytest.approx(reference["loss"], abs=bound)


@pytest.mark.parametrize("regime", REGIMES)
def test_accumulation_equals_one_large_batch(trained, regime):
    assert trained[f"{regime}-accumulated"]["loss"] == pytest.approx(trained[f"{regime}-fp32-2"]["loss"], rel=1e-5)


@pytest.mark.parametrize("regime", REGIMES)
def test_one_process_sees_and_learns_the_same_as_two(trained, alone, regime):
    """1 process x batch 4 against 2 processes x batch 2: the same clips, noise and losses in every step."""
    one, two = alone[f"{regime}-alone"], trained[f"{regime}-fp32-1"]
    assert len(one["seen"]) == 4 and one["seen"] == two["seen"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_validation_counts_every_clip_once_at_any_world_size(trained, alone):
    """5 clips on 2 processes x batch 2 leave a partial batch; the result must be that of one process."""
    (one,), (two,) = alone["flow_matching-alone"]["validation"], trained["flow_matching-fp32-1"]["validation"]
    for key in ("copy_last_l1", "mean_mse"):
        assert one[key] == pytest.approx(two[key], rel=1e-6)
    assert one["forecast_mse"] == pytest.approx(two["forecast_mse"], rel=1e-4)


def request(stage: int, precision: str, *overrides: str, zero: dict | None = None) -> tuple[list[str], dict]:
    return [*WIDE, f"engine.zero_stage={stage}", f"engine.precision={precision}", *overrides], zero or {}


@pytest.fixture(scope="module")
def measured(tiny) -> dict[int, dict[str, list[dict]]]:
    """By number of processes and name: what each rank sent and held."""
    bf16 = {f"bf16-{stage}": request(stage, "bf16") for stage in (1, 2, 3)}
    plain = {f"{precision}-{stage}": request(stage, precision) for precision in BYTES for stage in STAGES}
    accumulated = {f"accumulated-{stage}": request(stage, "bf16", "trainer.micro_batch_size=1") for stage in (1, 2, 3)}
    textbook = {f"textbook-{stage}": request(stage, "bf16", zero=zero) for stage, zero in TEXTBOOK.items()}
    found = {}
    for processes, requests in {1: bf16, 2: plain | accumulated | textbook, 4: bf16}.items():
        ranks = run_world(processes, measure_all, str(tiny), requests)
        found[processes] = {name: [rank[name] for rank in ranks] for name in requests}
    return found


def sent_bytes(rank: dict, processes: int) -> float:
    """Of everything but scalars, in bytes."""
    sizes = {"bfloat16": 2, "float32": 4, "int64": 8}
    messages = (name.split() + [elements] for name, elements in rank["sent"].items() if name != "scalars")
    return sum(
        Collective(kind, elements * sizes[dtype], hidden=False).sent(processes) for kind, dtype, elements in messages
    )


def padding(rank: dict, processes: int) -> float:
    """Elements by which what is sent or held may exceed the parameters. ZeRO 1 and 2 pad each of the two groups of
    parameters to a multiple of 2 * processes, ZeRO 3 each parameter to a multiple of `processes`, so fewer than
    processes * (tensors + 4)."""
    return processes * (rank["tensors"] + 4)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", BYTES)
def test_bytes_sent_an_update(measured, stage, precision):
    """Every collective of an update, two processes: gradients and weights travel in the compute dtype. At most eight
    scalars (norms, overflow) besides; stage 3 also compares its order of parameters, an integer each, until it knows
    it."""
    (rank, other), size = measured[2][f"{precision}-{stage}"], BYTES[precision]
    expected = sum(collective.sent(2) for collective in collectives(rank["parameters"], stage, size))
    assert 0 <= sent_bytes(rank, 2) - expected <= 2 * size * padding(rank, 2)
    assert rank["sent"] == other["sent"] and rank["sent"].get("scalars", 0) <= 8
    assert expected == (2, 3, 3, 2)[stage] * rank["parameters"] * size / 2  # half of it stays at home


@pytest.mark.parametrize("stage", TEXTBOOK)
def test_bytes_sent_can_be_the_textbooks(measured, stage):
    """With DeepSpeed's options for it: reduce to the owner (or scatter), and gather twice. (N - 1) / N of the paper's
    volume."""
    rank = measured[2][f"textbook-{stage}"][0]
    expected = TEXTBOOK_VOLUME[stage] * rank["parameters"] * 2 / 2
    assert 0 <= sent_bytes(rank, 2) - expected <= 3 * 2 * padding(rank, 2)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_bytes_sent_with_two_micro_batches(measured, stage):
    """Stages 2 and 3 reduce the gradients of every micro-batch. What ZeRO 3 leaves whole it gathers once an update."""
    rank = measured[2][f"accumulated-{stage}"][0]
    expected = sum(collective.sent(2) for collective in collectives(rank["parameters"], stage, 2, accumulation_steps=2))
    if stage == 3:
        expected -= rank["small"] * 2 / 2
    assert 0 <= sent_bytes(rank, 2) - expected <= 4 * 2 * padding(rank, 2)


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_optimizer_is_shared_out_evenly(measured, stage):
    """Master weights, moments and moving average on each rank at 1, 2 and 4 processes: 16 bytes a parameter /
    processes, to padding."""
    for processes, runs in measured.items():
        for rank in runs[f"bf16-{stage}"]:
            held = sum(rank["held"][name] for name in ("master", "moments", "average"))
            expected = model_states(rank["parameters"], stage, processes, 2, average=True).optimizer
            assert expected == 16 * rank["parameters"] / processes
            assert 0 <= held - expected <= 16 * padding(rank, processes) / processes


@pytest.mark.parametrize(
    ("kind", "stage"), [*itertools.product(BYTES, STAGES), ("accumulated", 1), ("accumulated", 2), ("accumulated", 3)]
)
def test_bytes_held(measured, kind, stage):
    """Every state on every rank. ZeRO 3 holds small parameters whole, and their shards besides. The optimizer steps
    matrices first, the small rest (biases, norms) after them, so up to the latter's gradients may be missing where
    they are most."""
    size = BYTES.get(kind, 2)
    for rank in measured[2][f"{kind}-{stage}"]:
        expected = model_states(
            rank["parameters"], stage, 2, size, average=True, accumulates=kind == "accumulated", overlaps=False
        )
        assert rank["held"]["buckets"] == expected.buckets
        slack = 16 * padding(rank, 2) / 2
        for name in ("master", "moments", "average"):
            assert 0 <= rank["held"][name] - getattr(expected, name) <= slack, name
        whole = size * rank["small"] if stage == 3 else 0
        assert 0 <= rank["held"]["weights"] - expected.weights - whole <= slack
        assert rank["held"]["gradients"] == pytest.approx(expected.gradients, abs=slack + 8 * rank["small"])


@pytest.mark.parametrize("stage", STAGES)
def test_an_estimate_says_what_two_processes_hold(measured, tiny, stage):
    """Of a configuration, without a process; to the padding, and what ZeRO 3 holds whole."""
    work = build_workload(load_config(tiny, WIDE), torch.bfloat16, 2)
    expected = device_memory(work, DEVICES["h100"], stage, 2).states
    for rank in measured[2][f"bf16-{stage}"]:
        held, whole = rank["held"], 2 * rank["small"] if stage == 3 else 0
        assert rank["parameters"] == work.head_parameters
        assert held["weights"] == pytest.approx(expected.weights + whole, rel=0.01)
        assert held["master"] + held["moments"] + held["average"] == pytest.approx(expected.optimizer, rel=0.01)
        assert held["gradients"] == pytest.approx(expected.gradients, rel=0.01, abs=8 * rank["small"])
