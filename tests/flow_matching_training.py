"""A few training steps by flow matching: as a run takes them, or in eager mode with the references of the fused ops."""

import torch
from flperf_kernels.flow_matching_reference import loss_reference, noise_reference
from torch import Tensor, nn

from flperf.config import Config, Model, Objective
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry
from flperf.objectives import flow_matching
from flperf.objectives.build import build_objective

GEOMETRY = LatentGeometry(context_frames=2, target_frames=2, height=3, width=3, dim=12)
MODEL = Model(head="dit", num_context_latents=2, hidden_dim=24, depth=1, num_heads=2)
CONFIG = Config(model=MODEL, objective=Objective(kind="flow_matching", loss="smooth_l1"))
STEPS, CLIPS = 3, 4


class LinearHead(nn.Module):
    """A head of few operations, for which Inductor generates code fast."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2 * GEOMETRY.dim + 1, GEOMETRY.dim)

    def forward(self, context: Tensor, noised: Tensor, tau: Tensor) -> Tensor:
        tau = tau[:, None, None, None, None].expand_as(noised[..., :1])
        return self.out(torch.cat([context, noised, tau], dim=-1))


def dit() -> nn.Module:
    return build_head(MODEL, GEOMETRY, seed=0, compile=False)


def train(head: nn.Module, device: str, backend: str | None) -> tuple[Tensor, Tensor]:
    """Losses [steps] and the change of all weights; backend: of torch.compile, or None for eager mode."""
    objective, head = build_objective(CONFIG, GEOMETRY), head.to(device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh DiT ignores its blocks, since its gates are zero
        for parameter in head.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    before = nn.utils.parameters_to_vector(head.parameters()).detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    loss_of = torch.compile(objective.loss, fullgraph=True, backend=backend) if backend else objective.loss
    losses = []
    for step in range(STEPS):
        context, target = torch.randn(2, CLIPS, 2, 3, 3, 12, generator=generator).to(device)
        loss = loss_of(head, context, target, torch.arange(CLIPS * step, CLIPS * (step + 1), device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), nn.utils.parameters_to_vector(head.parameters()).detach() - before


def use_references(monkeypatch) -> None:
    """Replace the fused ops by plain PyTorch, which autograd differentiates."""

    def noise(latents, tau, sample, *, seed, out_dtype):
        return noise_reference(latents, tau, sample, seed, None, None, "none", 1e-6, out_dtype)

    def loss(prediction, latents, sample, *, seed, loss, reduction):
        arguments = (None, None, "none", 1e-6, None, reduction, 1.0)
        return loss_reference(prediction, latents, sample, seed, loss, *arguments)

    monkeypatch.setattr(flow_matching, "flow_matching_noise", noise)
    monkeypatch.setattr(flow_matching, "flow_matching_loss", loss)


def assert_fused_and_compiled_trains_as_the_reference(build, device: str, backend: str, monkeypatch) -> None:
    """In fp32 the two differ only in the order of sums."""
    losses, change = train(build(), device, backend)
    use_references(monkeypatch)
    expected_losses, expected_change = train(build(), device, None)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    assert (change - expected_change).abs().max() < 1e-4 * expected_change.abs().max()
    assert (expected_change != 0).float().mean() > 0.99, "weights that don't change compare nothing"
