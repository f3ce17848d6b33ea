"""Compares one update by our optimizer, moving average included, with PyTorch's loop over tensors and its fused AdamW.

    python -m pytest benchmarks/test_optimizer.py

An update is bound by memory bandwidth: bytes are the reads and writes of weights, moments and average, and the reads of
gradients.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.sizes import DTYPE, configuration, encoder_of, geometry_of, head_of
from flperf.config import Trainer
from flperf.engine.optimizer import AdamWWithEMA

TRAINER = Trainer(max_steps=1)


def with_gradients(parameters: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    copies = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for copy in copies:
        copy.grad = torch.randn_like(copy)
    return copies


def usual(parameters: list[torch.nn.Parameter], fused: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=fused, foreach=False)
    averages = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update() -> None:
        optimizer.step()
        for average, parameter in zip(averages, parameters, strict=True):
            average.mul_(0.999).add_(parameter, alpha=0.001)

    return update


@pytest.mark.benchmark(group="optimizer step with a moving average")
def test_update(record):
    config = configuration("dit")
    geometry = geometry_of(config, encoder_of(config, DTYPE, False))
    parameters = list(head_of(config, geometry, torch.float32, False).parameters())
    optimizer = AdamWWithEMA([{"params": with_gradients(parameters), "ema_decay": 0.999}], TRAINER, clip=False)
    beside = {
        "a loop over tensors": usual(with_gradients(parameters), fused=False),
        "fused AdamW, a loop for the average": usual(with_gradients(parameters), fused=True),
    }
    count = sum(parameter.numel() for parameter in parameters)
    record(optimizer.step, "parameters", count, bytes=count * 4 * 9, rounds=9, beside=beside)
