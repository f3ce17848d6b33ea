"""From typed options to a DeepSpeed engine: process group, device, precision, optimizer, ZeRO.

Three things are ours: the optimizer keeps the moving average of the weights as one more optimizer state (so ZeRO
shards it, checkpoints carry it, and it follows the fp32 master weights, not their bf16 copies); learning rate and
decay are pure functions of the step (so nothing about a schedule is stored); blocks are compiled before DeepSpeed
sees them.
"""

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, set_z3_leaf_modules
from torch import Tensor, nn

from flperf.config import Config, Engine, Trainer
from flperf.data.samplers import BatchShare
from flperf.engine.optimizer import AdamWWithEMA, is_decayed
from flperf.models.flops import count_parameters
from flperf.models.heads import REPEATED


def deepspeed_options(
    engine: Engine, trainer: Trainer, share: BatchShare, parameters: int, dtype: torch.dtype, device: torch.device
) -> dict:
    """DeepSpeed's configuration for a head of so many parameters. Gradients accumulate in fp32 as soon as there is
    more than one micro-batch to add, but for ZeRO 0 in bf16, where DeepSpeed has no such optimizer."""
    bare = is_unwrapped(engine, dtype)
    options = {
        "train_batch_size": share.batch_size,
        "train_micro_batch_size_per_gpu": share.micro_batch_size,
        "gradient_accumulation_steps": share.accumulation_steps,
        "gradient_clipping": 0.0 if bare else trainer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "overlap_comm": device.type == "cuda",
            "reduce_bucket_size": min(parameters, REDUCE_BUCKET),  # allocated in full, so a small head gets a small one
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    if share.accumulation_steps > 1 and engine.zero_stage > 0:
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options


def is_unwrapped(engine: Engine, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed steps our optimizer directly, without a wrapper that clips and checks."""
    return engine.zero_stage == 0 and dtype == torch.float32


def build_engine(
    head: nn.Module, config: Config, share: BatchShare, dtype: torch.dtype, device: torch.device
) -> deepspeed.DeepSpeedEngine:
    """Wrap the head. Matrices decay; biases, norms and learned tokens don't."""
    head = head.to(device)
    if config.engine.zero_stage == 3:
        # Parameters are gathered for a whole block at a time, outside its compiled forward.
        set_z3_leaf_modules(head, list(REPEATED))
    decayed = [p for n, p in head.named_parameters() if is_decayed(n, p)]
    plain = [p for n, p in head.named_parameters() if not is_decayed(n, p)]
    groups = [
        {"params": decayed, "weight_decay": config.trainer.weight_decay, "ema_decay": None},
        {"params": plain, "weight_decay": 0.0, "ema_decay": None},
    ]
    optimizer = AdamWWithEMA(groups, config.trainer, clip=is_unwrapped(config.engine, dtype))
    options = deepspeed_options(config.engine, config.trainer, share, count_parameters(head), dtype, device)
    engine, *_ = deepspeed.initialize(model=head, optimizer=optimizer, config=options, dist_init_required=False)
    for state in optimizer.state.values():
        # DeepSpeed's ZeRO 0 allocates the moments by a step with zero gradients, which must not count
        state["step"].zero_()
    if config.engine.zero_stage in (1, 2):
        # In bf16 it would ask each tensor whether all of it is finite and wait for the answer, though the norm that
        # follows tells as much.
        engine.optimizer.check_overflow = lambda partition_gradients: None
    return engine


def head_weights(engine: deepspeed.DeepSpeedEngine, *, average: bool) -> dict[str, Tensor]:
    """Full fp32 weights of the head, or their moving average, by parameter name, on every process (a collective under
    ZeRO)."""
    average = average and engine.global_steps > engine.skipped_steps  # before the first update there is none
    if average and hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed 0.19 links optimizer states to parameters once, after the first group's first step, when the
        # others have none.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    masters = unsharded_masters(engine)
    return {
        name: _full_weight(engine, parameter, masters, average) for name, parameter in engine.module.named_parameters()
    }


def unsharded_masters(engine: deepspeed.DeepSpeedEngine) -> dict[nn.Parameter, Tensor]:
    """ZeRO 0: what the optimizer updates for each parameter of the head: the parameter itself in fp32, a master copy
    in bf16."""
    if engine.zero_optimization_stage() > 0:
        return {}
    if engine.optimizer is engine.basic_optimizer:
        return {parameter: parameter for parameter in engine.module.parameters()}
    wrapper = engine.optimizer
    groups = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _full_weight(engine: deepspeed.DeepSpeedEngine, parameter: nn.Parameter, masters: dict, average: bool) -> Tensor:
    if parameter in masters:
        master = masters[parameter]
        full = engine.basic_optimizer.state[master]["ema"] if average else master
    else:
        full = safe_get_full_optimizer_state(parameter, "ema") if average else safe_get_full_fp32_param(parameter)
    return full.detach()


def load_weights(head: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Fill a plain head with `weights` in the compute dtype; its tables (buffers) stay fp32."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.data = weights[name].to(dtype).clone()


REDUCE_BUCKET = 500_000_000  # elements, at most, of the buffer in which DeepSpeed collects gradients
