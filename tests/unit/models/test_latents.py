import pytest
import torch

from flperf.config import Config
from flperf.errors import UserError
from flperf.models.latents import LatentGeometry, Normaliser, latent_geometry

GEOMETRY = LatentGeometry(context_frames=2, target_frames=3, height=2, width=2, dim=5)


def random_latents(clips: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(clips)
    draw = lambda frames: 3 * torch.randn(clips, frames, 2, 2, 5, generator=generator) + torch.arange(5.0)  # noqa: E731
    return draw(2), draw(3)


def test_token_norms():
    context, _ = random_latents(3)
    token_norm = lambda kind, p: Normaliser(kind, torch.float32)(context).norm(p=p, dim=-1)  # noqa: E731
    torch.testing.assert_close(token_norm("l2", 2), torch.ones(3, 2, 2, 2))
    torch.testing.assert_close(token_norm("l1", 1), torch.ones(3, 2, 2, 2))
    layered = Normaliser("layer", torch.float32)(context)
    torch.testing.assert_close(layered.mean(-1), torch.zeros(3, 2, 2, 2), atol=1e-6, rtol=0)


def test_the_geometry_splits_the_clip():
    config = Config()
    config.model.num_context_latents = 3
    assert latent_geometry(config, 8, 2, 2, 5) == LatentGeometry(3, 5, 2, 2, 5)
    config.model.num_target_latents = 2
    assert latent_geometry(config, 8, 2, 2, 5) == LatentGeometry(3, 2, 2, 2, 5)
    for frames in (3, 4):
        with pytest.raises(UserError, match="num_context_latents"):
            latent_geometry(config, frames, 2, 2, 5)
