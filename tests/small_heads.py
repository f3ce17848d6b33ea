"""Small heads, their inputs, and a forward and backward pass."""

import torch

from flperf.config import Model
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry

GEOMETRY = LatentGeometry(context_frames=3, target_frames=2, height=2, width=3, dim=20)


def small(name: str, **changes) -> Model:
    return Model(head=name, hidden_dim=32, depth=2, num_heads=2, **changes)


def inputs(name: str, geometry: LatentGeometry = GEOMETRY, batch: int = 2) -> list[torch.Tensor]:
    """The context; for the DiT also noised latents and tau."""
    torch.manual_seed(1)
    grid = (geometry.height, geometry.width, geometry.dim)
    context = torch.randn(batch, geometry.context_frames, *grid)
    if name != "dit":
        return [context]
    return [context, torch.randn(batch, geometry.target_frames, *grid), torch.rand(batch)]


def perturbed(name: str, geometry: LatentGeometry = GEOMETRY, **changes) -> torch.nn.Module:
    """A head with noise on all weights, since layers that start at zero hide others from the output."""
    head = build_head(small(name, **changes), geometry, seed=0, compile=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return head


def forward_and_backward(head: torch.nn.Module, arguments: list[torch.Tensor]) -> torch.Tensor:
    """The loss; gradients are in the head."""
    loss = head(*arguments).square().mean()
    loss.backward()
    return loss.detach()
