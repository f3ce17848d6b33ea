"""Forecasts of the DiT: all samples from one projection of the context, against a projection at every evaluation of the velocity.

python -m pytest benchmarks/test_sampler.py
"""

import pytest
import torch

from benchmarks.sizes import BATCH, DEVICE, DTYPE, ON_GPU, configuration, encoder_of, head_of, latents_of, layout_of
from flperf.objective import build_objective, forecast

SAMPLES, STEPS = (4, 20) if ON_GPU else (2, 5)
VARIANTS = {"eager, context projected at every step": (False, True), "eager": (False, False), "compiled": (True, False)}


@pytest.mark.benchmark(group=f"{SAMPLES} samples of {STEPS} Euler steps")
@pytest.mark.parametrize("variant", VARIANTS)
def test_sample(record, variant, monkeypatch):
    compile, again = VARIANTS[variant]
    sampling = [f"evaluation.sampling.samples={SAMPLES}", f"evaluation.sampling.steps={STEPS}"]
    config = configuration("dit", "vjepa2", *sampling)
    layout = layout_of(config, encoder_of(config, DTYPE, False))
    head, objective = head_of(config, layout, DTYPE, compile).requires_grad_(False), build_objective(config, layout)
    context, _ = latents_of(layout, DTYPE)
    if again:
        velocity = head.velocity
        monkeypatch.setattr(head, "velocity", lambda x, tau, memory: velocity(x, tau, head.remember(context)))
    sample = torch.arange(BATCH, device=DEVICE)
    with torch.no_grad():
        record(lambda: forecast(objective, head, context, sample), "forecasts", BATCH * SAMPLES, rounds=3)
