"""DeepSpeed's training state as named fragments of parameters, alike at every ZeRO stage and in both precisions.

A fragment is what this process holds of one parameter: a run of its flattened elements, in the fp32 master weights
and in every state of the optimizer. Each stage keeps these in flat buffers of its own; a fragment is a view into
them, so that a checkpoint is copied out of and into the very memory that the optimizer updates, and one written at
any stage is read at any other.
"""

from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from flperf.engine.engine import unsharded_masters

WEIGHT = "weight"  # the fp32 master weights; the other states have the optimizer's own names


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, which are [offset, offset + numel) of a tensor the
    optimizer updates."""

    start: int
    numel: int
    master: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """This fragment's elements of the master weights, or of an optimizer state of their shape: a view [numel]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def held_fragments(engine: deepspeed.DeepSpeedEngine) -> dict[str, Fragment]:
    """By parameter name, what this process holds: everything at ZeRO 0, its own partition otherwise."""
    stage, masters = engine.zero_optimization_stage(), unsharded_masters(engine)

    def locate(parameter: nn.Parameter) -> Fragment | None:
        if stage == 0:
            return Fragment(0, parameter.numel(), masters[parameter], 0)
        return (_in_zero_3 if stage == 3 else _in_zero_1_or_2)(engine, parameter)

    located = {name: locate(parameter) for name, parameter in engine.module.named_parameters()}
    return {name: fragment for name, fragment in located.items() if fragment is not None}


def written_fragments(engine: deepspeed.DeepSpeedEngine, rank: int, world_size: int) -> dict[str, Fragment]:
    """What this process writes, so that each element is written once: at ZeRO 0, where all hold everything, an equal
    share."""
    held = held_fragments(engine)
    if engine.zero_optimization_stage() > 0:
        return held
    shares = {}
    for name, whole in held.items():
        start, end = (whole.numel * part // world_size for part in (rank, rank + 1))
        if end > start:
            shares[name] = Fragment(start, end - start, whole.master, start)
    return shares


def _in_zero_1_or_2(engine: deepspeed.DeepSpeedEngine, parameter: Any) -> Fragment | None:
    mapping = parameter._hp_mapping  # DeepSpeed hangs what it knows of a parameter on it
    if mapping is None:  # another process's partition
        return None
    # Each group of parameters is one flat tensor to the optimizer.
    (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(here.start, here.numel, master, there.start)


def _in_zero_3(engine: deepspeed.DeepSpeedEngine, parameter: Any) -> Fragment | None:
    optimizer = engine.optimizer
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = share * optimizer._get_param_partition_rank(parameter)
    numel = min(share, parameter.ds_numel - start)  # shares are equal, so the last ones are padded
    return Fragment(start, numel, optimizer.fp32_partitioned_groups_flat[group], offset) if numel > 0 else None


def parameter_shapes(engine: deepspeed.DeepSpeedEngine) -> dict[str, list[int]]:
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}


def state_tensors(engine: deepspeed.DeepSpeedEngine, fragment: Fragment) -> dict[str, Tensor]:
    """The fragment's elements by state: fp32 views [numel]. Before the first update there may be no state but the
    weights."""
    states = engine.basic_optimizer.state.get(fragment.master, {})
    views = {name: fragment.of(tensor) for name, tensor in states.items() if name != "step"}
    return {WEIGHT: fragment.of(fragment.master)} | views


def optimizer_step(engine: deepspeed.DeepSpeedEngine) -> int:
    """The updates that Adam's bias correction counts, which are those not skipped: the same for all parameters."""
    return next((int(state["step"]) for state in engine.basic_optimizer.state.values()), 0)


def allocate_states(
    engine: deepspeed.DeepSpeedEngine, fragments: dict[str, Fragment], states: list[str], step: int
) -> None:
    """Give the optimizer the states that a checkpoint holds, as its first update would, and the count of updates."""
    if states == [WEIGHT]:  # written before the first update, which still is to come
        return
    for fragment in fragments.values():
        state = engine.basic_optimizer.state[fragment.master]
        for name in states:
            if name != WEIGHT and name not in state:
                state[name] = torch.zeros_like(fragment.master, requires_grad=False)
        state["step"] = torch.tensor(float(step), device=fragment.master.device)  # where and as a fused AdamW keeps it


def copy_masters_to_parameters(engine: deepspeed.DeepSpeedEngine) -> None:
    """Round the master weights into the parameters that all processes compute with (a collective under ZeRO)."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for parameter, master in unsharded_masters(engine).items():
            parameter.data.copy_(master.data)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()  # parts all parameters
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers the small ones, which stay whole
