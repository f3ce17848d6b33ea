"""Sampling from the compiled DiT, with the context projected once for all samples, against eager, and against a
projection of the context at every step.

    python -m pytest benchmarks/test_sampler.py
"""

import pytest
import torch

from benchmarks.sizes import BATCH, DEVICE, DTYPE, ON_GPU, configuration, encoder_of, geometry_of, head_of, latents_of
from flperf.models.flops import count_flops, head_flops
from flperf.objectives.build import build_objective, forecast

SAMPLES, STEPS = (4, 20) if ON_GPU else (2, 5)


class ContextEncoder(torch.nn.Module):
    """The part of a head that a forecast computes once."""

    def __init__(self, head: torch.nn.Module):
        super().__init__()
        self.head = head

    def forward(self, context: torch.Tensor):
        return self.head.encode_context(context)


@pytest.mark.benchmark(group=f"{SAMPLES} samples of {STEPS} Euler steps")
def test_sample(record):
    sampling = [f"evaluation.sampling.samples={SAMPLES}", f"evaluation.sampling.steps={STEPS}"]
    config = configuration("dit", "vjepa2", *sampling)
    geometry = geometry_of(config, encoder_of(config, DTYPE, False))
    objective, (context, _) = build_objective(config, geometry), latents_of(geometry, DTYPE)
    compiled, eager, again = (
        head_of(config, geometry, DTYPE, compile).requires_grad_(False) for compile in (True, False, False)
    )
    velocity = again.velocity
    again.velocity = lambda x, tau, memory: velocity(x, tau, again.encode_context(context))
    sample = torch.arange(BATCH, device=DEVICE)
    once = count_flops(ContextEncoder(eager), (1, *context.shape[1:]))
    flops = BATCH * (once + SAMPLES * STEPS * (head_flops(eager, geometry, True) - once))

    def forecasts(head: torch.nn.Module):
        return torch.no_grad()(lambda: forecast(objective, head, context, sample))

    beside = {"eager": forecasts(eager), "eager, context projected at every step": forecasts(again)}
    record(forecasts(compiled), "forecasts", BATCH * SAMPLES, flops=flops, dtype=DTYPE, beside=beside)
