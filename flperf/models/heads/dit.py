"""Diffusion transformer (DiT, arXiv:2212.09748): noised target latents and tau to a velocity, with cross-attention to
the context.

Gates and output start at zero, so a fresh DiT predicts zero velocity.
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flperf.config import Model
from flperf.models.heads.layers import Block, ContextEmbedding, KeysValues, TauEmbedding, initialise
from flperf.models.heads.positions import Positions
from flperf.models.latents import LatentGeometry

Memory = list[tuple[Tensor, Tensor]]


class DiT(nn.Module):
    """Noised target tokens, modulated by tau, that read the context in every block; needs flow matching."""

    def __init__(self, model: Model, geometry: LatentGeometry):
        super().__init__()
        self.geometry = geometry
        self.positions = Positions(model.positions, geometry, model.hidden_dim, model.num_heads)
        self.context = ContextEmbedding(geometry.dim, model.hidden_dim)
        self.noised = nn.Linear(geometry.dim, model.hidden_dim)
        self.tau = TauEmbedding(model.hidden_dim)
        self.memory = nn.ModuleList(KeysValues(model.hidden_dim, model.num_heads) for _ in range(model.depth))
        self.blocks = nn.ModuleList(
            Block(model.hidden_dim, model.num_heads, model.mlp_ratio, cross_attention=True, modulated=True)
            for _ in range(model.depth)
        )
        self.norm = nn.LayerNorm(model.hidden_dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(model.hidden_dim, 2 * model.hidden_dim)
        self.out = nn.Linear(model.hidden_dim, geometry.dim)
        modulations = [module for block in self.blocks if isinstance(module := block.modulation, nn.Linear)]
        initialise(self, zero=[self.out, self.modulation, *modulations])

    def encode_context(self, context: Tensor) -> Memory:
        """Keys and values of the context `b t h w c` for every block. A sampler computes them once for all its
        steps."""
        tokens = self.positions.add(self.context(context), "context")  # b m d
        return [keys_values(tokens, self.positions.rotary("context")) for keys_values in self.memory]

    def velocity(self, noised: Tensor, tau: Tensor, memory: Memory) -> Tensor:
        """noised `b t' h w c` at tau [b] and the memory of the context to the velocity data - noise, `b t' h w c`."""
        condition = self.tau(tau)  # b d
        x = self.noised(rearrange(noised, "b t h w c -> b (t h w) c"))
        x = self.positions.add(x, "target")  # b n d
        for block, keys_values in zip(self.blocks, memory, strict=True):
            x = block(x, self.positions.rotary("target"), keys_values, condition)
        shift, scale = rearrange(self.modulation(F.silu(condition)), "b (two d) -> two b 1 d", two=2).unbind()
        x = self.out(self.norm(x) * (1 + scale) + shift)
        return rearrange(x, "b (t h w) c -> b t h w c", h=self.geometry.height, w=self.geometry.width)

    def forward(self, context: Tensor, noised: Tensor, tau: Tensor) -> Tensor:
        """context `b t h w c`, noised `b t' h w c` at tau [b] to the velocity `b t' h w c`."""
        return self.velocity(noised, tau, self.encode_context(context))
