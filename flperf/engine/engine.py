"""Builds the DeepSpeed engine of a head from typed options, and reads the head's weights from it.

flperf adds three things to DeepSpeed. The optimizer keeps the moving average of the weights as one more optimizer
state, so that ZeRO shards it, checkpoints contain it, and it follows the fp32 master weights rather than their bf16
copies. Learning rate and decay are pure functions of the step, so that no state of a schedule is stored. Blocks are
compiled before DeepSpeed sees them.
"""

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, set_z3_leaf_modules
from torch import Tensor, nn

from flperf.config import Config, Engine, Trainer
from flperf.data.samplers import BatchShare
from flperf.engine.deepspeed_internals import (
    inner_optimizer,
    link_optimizer_states,
    measure_gradients_together,
    skip_overflow_check,
    unsharded_masters,
)
from flperf.engine.optimizer import AdamWWithEMA, is_decayed
from flperf.models.flops import count_parameters
from flperf.models.heads import REPEATED

REDUCE_BUCKET = 500_000_000  # largest size, in elements, of DeepSpeed's gradient buffer


def deepspeed_options(
    engine: Engine, trainer: Trainer, share: BatchShare, parameters: int, dtype: torch.dtype, device: torch.device
) -> dict:
    """DeepSpeed's configuration for a head with this number of parameters. Several micro-batches accumulate gradients
    in fp32, except at ZeRO 0 in bf16, which DeepSpeed does not support."""
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
            "reduce_bucket_size": min(parameters, REDUCE_BUCKET),  # the buffer is always allocated in full
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    if share.accumulation_steps > 1 and engine.zero_stage > 0:
        options["data_types"] = {"grad_accum_dtype": "fp32"}
    return options


def is_unwrapped(engine: Engine, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed steps flperf's optimizer directly, without a wrapper that clips gradients and skips non-finite
    updates."""
    return engine.zero_stage == 0 and dtype == torch.float32


def build_engine(
    head: nn.Module, config: Config, share: BatchShare, dtype: torch.dtype, device: torch.device
) -> DeepSpeedEngine:
    """Wrap the head. Weight decay applies to matrices, not to biases, norms and learned tokens."""
    head = head.to(device)
    if config.engine.zero_stage == 3:
        # Gather the parameters of a whole block at once, outside its compiled forward.
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
        # DeepSpeed's ZeRO 0 allocates the moments by a step with zero gradients, which must not count as an update.
        state["step"].zero_()
    if config.engine.zero_stage in (1, 2):
        skip_overflow_check(engine)
        measure_gradients_together(engine)
    return engine


def head_weights(engine: DeepSpeedEngine, *, average: bool) -> dict[str, Tensor]:
    """Full fp32 weights of the head, or their moving average, by parameter name, on every process (a collective at ZeRO
    1 to 3). Before the first update there is no average, and the weights are returned."""
    average = average and engine.global_steps > engine.skipped_steps
    if average:
        link_optimizer_states(engine)
    masters = unsharded_masters(engine)
    return {
        name: _full_weight(engine, parameter, masters, average) for name, parameter in engine.module.named_parameters()
    }


def _full_weight(
    engine: DeepSpeedEngine, parameter: nn.Parameter, masters: dict[nn.Parameter, Tensor], average: bool
) -> Tensor:
    if parameter in masters:
        master = masters[parameter]
        full = inner_optimizer(engine).state[master]["ema"] if average else master
    else:
        full = safe_get_full_optimizer_state(parameter, "ema") if average else safe_get_full_fp32_param(parameter)
    return full.detach()


def load_weights(head: nn.Module, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Fill a plain head with `weights` in the compute dtype; its buffers stay fp32."""
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            parameter.data = weights[name].to(dtype).clone()
