"""AdamW with a moving average of the weights, and the schedules of learning rate and decay as functions of the step."""

import math
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from flperf.config import Trainer
from flperf.engine.deepspeed_internals import inner_optimizer, publish_grad_norm


class AdamWWithEMA(torch.optim.AdamW):
    """Fused AdamW that also keeps an exponential moving average of the weights, as the optimizer state "ema".

    `group["ema_decay"]` is the decay of the next step; None keeps no average. With `clip` the optimizer also clips the
    norm of the gradients and skips non-finite updates. DeepSpeed does both in its wrappers, but ZeRO 0 in fp32 has no
    wrapper.
    """

    def __init__(self, groups: list[dict], trainer: Trainer, clip: bool):
        super().__init__(groups, lr=0.0, betas=(trainer.betas[0], trainer.betas[1]), fused=True)
        self.max_grad_norm = trainer.max_grad_norm if clip else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            finite = math.isfinite(norm)
            publish_grad_norm(self, norm, skipped=not finite)
            if not finite:
                return
        super().step()
        for group in self.param_groups:
            if group["ema_decay"] is not None:
                self._average([p for p in group["params"] if p.grad is not None], 1.0 - group["ema_decay"])

    def _average(self, parameters: list[Tensor], weight: float) -> None:
        if not parameters:  # ZeRO 3 steps one parameter group at a time; the others are empty
            return
        for parameter in parameters:
            if "ema" not in self.state[parameter]:
                self.state[parameter]["ema"] = parameter.detach().clone()
        torch._foreach_lerp_([self.state[parameter]["ema"] for parameter in parameters], parameters, weight)


def learning_rate(step: int, trainer: Trainer, total_steps: int) -> float:
    """Linear warm-up, then a cosine to `final_learning_rate`, or constant."""
    if step < trainer.warmup_steps:
        return trainer.learning_rate * (step + 1) / trainer.warmup_steps
    if trainer.schedule == "constant":
        return trainer.learning_rate
    progress = (step - trainer.warmup_steps) / max(1, total_steps - trainer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return trainer.final_learning_rate + (trainer.learning_rate - trainer.final_learning_rate) * cosine


def ema_decay(step: int, trainer: Trainer) -> float | None:
    """The decay is (1 + step) / (10 + step) until that reaches its final value, so that early averages soon forget the
    initial weights."""
    return None if trainer.ema_decay is None else min(trainer.ema_decay, (1 + step) / (10 + step))


def set_schedule(engine: DeepSpeedEngine, step: int, trainer: Trainer, total_steps: int) -> float:
    """Set the learning rate and the decay of the next update; returns the learning rate."""
    rate = learning_rate(step, trainer, total_steps)
    for group in inner_optimizer(engine).param_groups:
        group["lr"], group["ema_decay"] = rate, ema_decay(step, trainer)
    return rate


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices only."""
    return name.endswith("weight") and parameter.ndim >= 2
