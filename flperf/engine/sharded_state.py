"""DeepSpeed's training state as named fragments of parameters, in one layout for all ZeRO stages and precisions.

A fragment is the part of one flattened parameter that this process holds, in the fp32 master weights and in every
state of the optimizer. Each ZeRO stage keeps these in flat buffers of its own, and a fragment is a view into them. A
checkpoint is therefore copied from and into the memory that the optimizer updates, and any stage reads what any other
has written.
"""

from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from flperf.engine.deepspeed_internals import full_shape, held_partition, inner_optimizer, unsharded_masters

WEIGHT = "weight"  # the fp32 master weights; the other states have the optimizer's own names


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter. They are elements [offset, offset + numel) of the
    flattened tensor `master`, which the optimizer updates."""

    start: int
    numel: int
    master: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of the master weights or of an optimizer state of the same shape: a view [numel]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def held_fragments(engine: DeepSpeedEngine) -> dict[str, Fragment]:
    """By parameter name, the fragments that this process holds: whole parameters at ZeRO 0, its partition otherwise."""
    if engine.zero_optimization_stage() == 0:
        masters = unsharded_masters(engine)
        return {name: Fragment(0, p.numel(), masters[p], 0) for name, p in engine.module.named_parameters()}
    partitions = {name: held_partition(engine, parameter) for name, parameter in engine.module.named_parameters()}
    return {name: Fragment(*partition) for name, partition in partitions.items() if partition is not None}


def written_fragments(engine: DeepSpeedEngine, rank: int, world_size: int) -> dict[str, Fragment]:
    """The fragments that this process writes, so that each element is written once. At ZeRO 0, where every process
    holds everything, each writes an equal share."""
    held = held_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    shares = {}
    for name, whole in held.items():
        start, end = (whole.numel * part // world_size for part in (rank, rank + 1))
        if end > start:
            shares[name] = Fragment(start, end - start, whole.master, start)
    return shares


def parameter_shapes(engine: DeepSpeedEngine) -> dict[str, list[int]]:
    """Shapes of the whole parameters by name."""
    return {name: list(full_shape(parameter)) for name, parameter in engine.module.named_parameters()}


def state_tensors(engine: DeepSpeedEngine, fragment: Fragment) -> dict[str, Tensor]:
    """By state, the fragment's elements: fp32 views [numel]. Before the first update the weights may be the only
    state."""
    states = inner_optimizer(engine).state.get(fragment.master, {})
    views = {name: fragment.of(tensor) for name, tensor in states.items() if name != "step"}
    return {WEIGHT: fragment.of(fragment.master)} | views


def optimizer_step(engine: DeepSpeedEngine) -> int:
    """The number of updates in Adam's bias correction, the same for all parameters. Skipped updates do not count."""
    return next((int(state["step"]) for state in inner_optimizer(engine).state.values()), 0)


def allocate_states(engine: DeepSpeedEngine, fragments: dict[str, Fragment], states: list[str], step: int) -> None:
    """Give the optimizer the states that a checkpoint holds, as its first update would, and the number of updates."""
    if states == [WEIGHT]:  # written before the first update
        return
    for fragment in fragments.values():
        state = inner_optimizer(engine).state[fragment.master]
        for name in states:
            if name != WEIGHT and name not in state:
                state[name] = torch.zeros_like(fragment.master, requires_grad=False)
        state["step"] = torch.tensor(float(step), device=fragment.master.device)  # as fused AdamW keeps it
