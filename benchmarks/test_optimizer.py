"""One update of the head's parameters: PyTorch's loop over tensors, its fused AdamW, and ours, which keeps the moving average too.

    python -m pytest benchmarks/test_optimizer.py

An update is bound by memory: GB/s counts weights, gradients and moments, read and written once (and the average's read and write).
"""

import pytest
import torch

from benchmarks.sizes import DEVICE, DTYPE, configuration, encoder_of, head_of, layout_of
from flperf.config import Trainer
from flperf.engine import AdamWWithEMA

TRAINER = Trainer(max_steps=1)


@torch.no_grad()
def average_by_hand(averages: list[torch.Tensor], parameters: list[torch.Tensor]) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.mul_(0.999).add_(parameter, alpha=0.001)


@pytest.mark.benchmark(group="optimizer step with a moving average")
@pytest.mark.parametrize("variant", ["a loop over tensors", "fused AdamW, a loop for the average", "AdamWWithEMA"])
def test_update(record, variant):
    config = configuration("dit")
    layout = layout_of(config, encoder_of(config, DTYPE, False))
    parameters = list(head_of(config, layout, torch.float32, False).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    averages = [parameter.detach().clone() for parameter in parameters]
    if variant == "AdamWWithEMA":
        optimizer = AdamWWithEMA([{"params": parameters, "ema_decay": 0.999}], TRAINER, clip=False)
        step = optimizer.step
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=variant.startswith("fused"), foreach=False)

        def step() -> None:
            optimizer.step()
            average_by_hand(averages, parameters)

    count = sum(parameter.numel() for parameter in parameters)
    record(step, "GB", count * 4 * 9 / 1e9, rounds=9)
    assert parameters[0].device == DEVICE
