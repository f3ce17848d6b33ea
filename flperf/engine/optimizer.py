"""AdamW that keeps a moving average, and the schedules of learning rate and decay as functions of the step."""

import math

import deepspeed
import torch
from torch import Tensor, nn

from flperf.config import Trainer


class AdamWWithEMA(torch.optim.AdamW):
    """Fused AdamW that also keeps an exponential moving average of what it updates, under the state key "ema".

    `group["ema_decay"]` is the decay of the coming step; None keeps no average. With `clip` it also clips the
    gradients' norm and skips a non-finite update: DeepSpeed does both in its own wrappers but not for a bare fp32
    optimizer (ZeRO 0).
    """

    def __init__(self, groups: list[dict], trainer: Trainer, clip: bool):
        super().__init__(groups, lr=0.0, betas=(trainer.betas[0], trainer.betas[1]), fused=True)
        self.max_grad_norm = trainer.max_grad_norm if clip else None
        self.overflow = False

    @torch.no_grad()
    def step(self, closure=None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.max_grad_norm is not None:
            self._global_grad_norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            self.overflow = not math.isfinite(self._global_grad_norm)
            if self.overflow:
                return
        super().step()
        for group in self.param_groups:
            if group["ema_decay"] is not None:
                self._average([p for p in group["params"] if p.grad is not None], 1.0 - group["ema_decay"])

    def _average(self, parameters: list[Tensor], weight: float) -> None:
        if not parameters:  # ZeRO 3 steps one group of parameters at a time, the others being empty
            return
        for parameter in parameters:
            if "ema" not in self.state[parameter]:
                self.state[parameter]["ema"] = parameter.detach().clone()
        torch._foreach_lerp_([self.state[parameter]["ema"] for parameter in parameters], parameters, weight)


def learning_rate(step: int, trainer: Trainer, total_steps: int) -> float:
    """Linear warm-up, then cosine to `final_learning_rate` (or constant)."""
    if step < trainer.warmup_steps:
        return trainer.learning_rate * (step + 1) / trainer.warmup_steps
    if trainer.schedule == "constant":
        return trainer.learning_rate
    progress = (step - trainer.warmup_steps) / max(1, total_steps - trainer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return trainer.final_learning_rate + (trainer.learning_rate - trainer.final_learning_rate) * cosine


def ema_decay(step: int, trainer: Trainer) -> float | None:
    """The decay grows to its final value as (1 + step) / (10 + step), so that early averages forget the initial
    weights."""
    return None if trainer.ema_decay is None else min(trainer.ema_decay, (1 + step) / (10 + step))


def set_schedule(engine: deepspeed.DeepSpeedEngine, step: int, trainer: Trainer, total_steps: int) -> float:
    """Set learning rate and EMA decay of the coming update; returns the learning rate."""
    rate = learning_rate(step, trainer, total_steps)
    for group in engine.optimizer.param_groups:
        group["lr"], group["ema_decay"] = rate, ema_decay(step, trainer)
    return rate


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith("weight") and parameter.ndim >= 2
