"""Every part of DeepSpeed that is not its public interface, one function each. No other file touches them.

They may change in any release, so `require_known_version` refuses the versions that this file was not checked with.
"""

from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from flperf.errors import UserError

KNOWN_VERSION = "0.19"


def require_known_version() -> None:
    """Raise `UserError` unless DeepSpeed has the major and minor version that this file was checked with."""
    if deepspeed.__version__.split(".")[:2] != KNOWN_VERSION.split("."):
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed, but flperf uses internals of {KNOWN_VERSION}: "
            f"pip install 'deepspeed~={KNOWN_VERSION}.0'"
        )


def skip_shm_build() -> None:
    """Keep DeepSpeed on a CPU from compiling, for a minute or more, a shared-memory all-reduce that only inference
    uses."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def publish_grad_norm(optimizer: torch.optim.Optimizer, norm: Tensor, skipped: bool) -> None:
    """Set what DeepSpeed reads after each step of an optimizer that it does not wrap: the gradients' norm, and whether
    the update was skipped."""
    published: Any = optimizer
    published._global_grad_norm, published.overflow = norm, skipped


def inner_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that the engine was built with, without DeepSpeed's wrapper. Both have the same groups and
    state."""
    return engine.basic_optimizer


def skip_overflow_check(engine: DeepSpeedEngine) -> None:
    """ZeRO 1 and 2 in bf16 ask for each gradient tensor whether it is finite, and wait for the answer. The norm that
    is computed next shows the same."""
    engine.optimizer.check_overflow = lambda partition_gradients: None


def measure_gradients_together(engine: DeepSpeedEngine) -> None:
    """ZeRO 1 and 2 convert each gradient tensor to fp64 and take its norm, several kernels for each. Here one operation
    reads all of a group in their own dtype, and sums in fp32. On a CPU a tensor of ten million numbers then has a norm
    that is 3e-4 too small, by which clipping may err: AdamW divides by the size of gradients."""
    zero = engine.optimizer

    def norm(gradients: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
        """The norm over all processes; -1, by which DeepSpeed knows it, if that is not finite."""
        held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
        norms = torch._foreach_norm(held, 2, dtype=torch.float32) if held else [torch.zeros((), device=engine.device)]
        squares = torch.stack(norms).square().sum()
        deepspeed.comm.all_reduce(squares, group=zero.dp_process_group)
        return torch.where(squares.isfinite(), squares.sqrt(), -1.0)

    zero.get_grad_norm_direct = norm


def link_optimizer_states(engine: DeepSpeedEngine) -> None:
    """Let `deepspeed.utils.safe_get_full_optimizer_state` find the states of all parameters. DeepSpeed links them once,
    after the first step of the first parameter group, when the other groups have no states yet."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def unsharded_masters(engine: DeepSpeedEngine) -> dict[nn.Parameter, Tensor]:
    """ZeRO 0: the tensor that the optimizer updates for each parameter. In fp32 it is the parameter, in bf16 an fp32
    master copy. Empty at the other stages."""
    if engine.zero_optimization_stage() > 0:
        return {}
    wrapper = engine.optimizer
    if wrapper is engine.basic_optimizer:
        return {parameter: parameter for parameter in engine.module.parameters()}
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def held_partition(engine: DeepSpeedEngine, parameter: Any) -> tuple[int, int, Tensor, int] | None:
    """ZeRO 1 to 3: (start, numel, master, offset), where elements [start, start + numel) of the flattened parameter are
    elements [offset, offset + numel) of the flat fp32 tensor `master`, which this process's optimizer updates. None
    where this process holds no element."""
    return (_zero_3_partition if engine.zero_optimization_stage() == 3 else _zero_1_2_partition)(engine, parameter)


def _zero_1_2_partition(engine: DeepSpeedEngine, parameter: Any) -> tuple[int, int, Tensor, int] | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    # Each parameter group is one flat tensor to the optimizer.
    (master,) = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"]
    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
    return low.start, low.numel, master, high.start


def _zero_3_partition(engine: DeepSpeedEngine, parameter: Any) -> tuple[int, int, Tensor, int] | None:
    optimizer = engine.optimizer
    group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = share * optimizer._get_param_partition_rank(parameter)
    numel = min(share, parameter.ds_numel - start)  # shares are equal, so the last ones are padded
    return (start, numel, optimizer.fp32_partitioned_groups_flat[group], offset) if numel > 0 else None


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter. ZeRO 3 leaves an empty tensor where the parameter is not gathered."""
    return getattr(parameter, "ds_shape", parameter.shape)


def copy_masters_to_parameters(engine: DeepSpeedEngine) -> None:
    """Round the fp32 master weights into the parameters of the compute dtype (a collective at ZeRO 1 to 3)."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        for parameter, master in unsharded_masters(engine).items():
            parameter.data.copy_(master.data)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        optimizer.checkpoint_event_prologue()  # partitions all parameters
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()  # gathers the small parameters, which training keeps whole


def restore_counters(engine: DeepSpeedEngine, step: int, skipped_updates: int) -> None:
    """Let the engine count on from `step` updates, `skipped_updates` of them skipped."""
    engine.global_steps, engine.skipped_steps = step, skipped_updates
    engine.global_samples = step * engine.train_batch_size()
