"""A few updates at each ZeRO stage, and what each rank sent and held.

Collectives are counted as operators of PyTorch's dispatcher, `c10d::…`, through which all of them pass. DeepSpeed's own
logger sees only what goes through `deepspeed.comm`.
"""

from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flperf.config import load_config
from flperf.engine import engine as flperf_engine
from flperf.engine.engine import build_engine
from flperf.engine.optimizer import AdamWWithEMA, set_schedule
from flperf.engine.process import batch_share, compute_dtype, start_process
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry

GEOMETRY = LatentGeometry(context_frames=2, target_frames=2, height=2, width=2, dim=24)
PERSISTENT = 100_000  # elements below which ZeRO 3 leaves a parameter whole, DeepSpeed's default
UPDATES = 3  # DeepSpeed watches two before it knows the order in which ZeRO 3 needs parameters
KINDS = {
    "allreduce_": "all_reduce",
    "_reduce_scatter_base_": "reduce_scatter",
    "_allgather_base_": "all_gather",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):
    """Elements of every collective's message (the whole tensor, of which a rank has or gets a part), by kind and
    dtype."""

    def __init__(self):
        super().__init__()
        self.messages: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            tensors = [[leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor)] for argument in args]
            dtype = next(group[0].dtype for group in tensors if group)
            elements = max(sum(tensor.numel() for tensor in group) for group in tensors)
            self.messages.append((KINDS.get(func._opname, func._opname), str(dtype).removeprefix("torch."), elements))
        return func(*args, **(kwargs or {}))


def held_bytes(*tensors: Tensor | None) -> int:
    """Bytes of the tensors' memory, each piece counted once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in tensors
        if tensor is not None
    }
    return sum(storages.values())


def held_weights(engine) -> int:
    """Bytes of the weights in the compute dtype: the whole, and in ZeRO 3 also this rank's partition."""
    partitions = [parameter.ds_tensor for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")]
    return held_bytes(*engine.module.parameters(), *partitions)


def held_states(engine) -> dict[str, int]:
    """Bytes of what the optimizer keeps on this rank."""
    state = engine.basic_optimizer.state
    weights = {id(parameter) for parameter in engine.module.parameters()}
    return {
        "weights": held_weights(engine),
        "master": held_bytes(*(key for key in state if id(key) not in weights)),
        "moments": held_bytes(*(entry[name] for entry in state.values() for name in ("exp_avg", "exp_avg_sq"))),
        "average": held_bytes(*(entry["ema"] for entry in state.values())),
    }


def held_gradients(engine, optimizer: AdamWWithEMA) -> int:
    """Bytes of gradients at the moment the optimizer steps: the head's own, DeepSpeed's sums, and what the optimizer
    is given."""
    wrapper = engine.optimizer
    sums = [
        getattr(wrapper, name, None)
        for name in ("averaged_gradients", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
    ]
    stepped = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
    tensors = [leaf for leaf in tree_leaves(sums) if isinstance(leaf, Tensor)]
    return held_bytes(*tensors, *stepped, *(parameter.grad for parameter in engine.module.parameters()))


def measure(config_path: str, overrides: list[str], zero: dict, process) -> dict:
    """Messages of the last update, and the bytes held by this rank after it (gradients: at their most, as the
    optimizer steps)."""
    config = load_config(config_path, ["name=zero", *overrides])
    dtype, share = compute_dtype(config.engine.precision, process.device), batch_share(config.trainer, process)
    head = build_head(config.model, GEOMETRY, seed=0, compile=False)
    shapes = [parameter.shape for parameter in head.parameters()]
    ordinary = flperf_engine.deepspeed_options

    def options(*arguments) -> dict:
        result = ordinary(*arguments)
        return result | {"zero_optimization": result["zero_optimization"] | zero}

    with mock.patch.object(flperf_engine, "deepspeed_options", options):
        engine = build_engine(head, config, share, dtype, process.device)
    gradients, step = [0], engine.basic_optimizer.step

    def observed_step(*arguments, **keywords):
        gradients.append(held_gradients(engine, engine.basic_optimizer))
        return step(*arguments, **keywords)

    engine.basic_optimizer.step = observed_step
    context = torch.ones(
        share.micro_batch_size, GEOMETRY.context_frames, GEOMETRY.height, GEOMETRY.width, GEOMETRY.dim, dtype=dtype
    )
    for update in range(UPDATES):
        set_schedule(engine, update, config.trainer, UPDATES)
        with Collectives() as collectives:
            for _ in range(share.accumulation_steps):
                engine.backward((engine(context).float() - 1).square().mean())
                engine.step()
    # one on a CPU; DeepSpeed allocates it in full
    buckets = dtype.itemsize * getattr(engine.optimizer, "reduce_bucket_size", 0)
    sent = Counter()
    for kind, type_name, elements in collectives.messages:
        sent[f"{kind} {type_name}" if elements > 1 else "scalars"] += elements
    return {
        "parameters": sum(map(torch.Size.numel, shapes)),
        "tensors": len(shapes),
        "small": sum(shape.numel() for shape in shapes if shape.numel() < PERSISTENT),
        "sent": sent,
        "held": held_states(engine) | {"gradients": max(gradients), "buckets": buckets},
    }


def measure_all(config_path: str, requests: dict[str, tuple[list[str], dict]]) -> dict[str, dict]:
    """By name; a request is its overrides and the `zero_optimization` keys of DeepSpeed that replace flperf's."""
    process = start_process()
    return {name: measure(config_path, overrides, zero, process) for name, (overrides, zero) in requests.items()}
