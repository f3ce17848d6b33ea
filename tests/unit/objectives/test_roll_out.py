"""Forecasts that are longer than those of training."""

import pytest
import torch

from flperf.config import Config
from flperf.models.latents import LatentGeometry
from flperf.objectives.build import build_objective, forecast


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_a_roll_out_of_known_dynamics_is_exact(frames):
    """The head halves the last latent at each frame, and so must a roll-out, however often it calls the head."""
    head = lambda context: torch.cat([context[:, -1:] * 0.5**j for j in (1, 2, 3)], dim=1)  # noqa: E731
    context = torch.randn(2, 2, 1, 2, 4, generator=torch.Generator().manual_seed(0))
    objective = build_objective(Config(), LatentGeometry(2, 3, 1, 2, 4))
    rolled = forecast(objective, head, context, torch.arange(2), frames)
    expected = torch.stack([context[:, -1] * 0.5**j for j in range(1, frames + 1)], dim=1)
    assert torch.equal(rolled, expected[:, None])
