"""Deterministic predictor: context tokens and one mask token for each target token attend to one another. The mask
tokens become the forecast."""

import torch
from einops import rearrange
from torch import Tensor, nn

from flperf.config import Model
from flperf.models.heads.layers import Block, ContextEmbedding, expand_token, initialise, learned_token
from flperf.models.heads.positions import Positions
from flperf.models.latents import LatentGeometry


class Predictor(nn.Module):
    """One sequence of context tokens and mask tokens; needs regression."""

    def __init__(self, model: Model, geometry: LatentGeometry):
        super().__init__()
        self.geometry = geometry
        self.positions = Positions(model.positions, geometry, model.hidden_dim, model.num_heads)
        self.context = ContextEmbedding(geometry.dim, model.hidden_dim)
        self.mask_token = learned_token(model.hidden_dim)
        self.blocks = nn.ModuleList(
            Block(model.hidden_dim, model.num_heads, model.mlp_ratio) for _ in range(model.depth)
        )
        self.norm = nn.LayerNorm(model.hidden_dim, eps=1e-6)
        self.out = nn.Linear(model.hidden_dim, geometry.dim)
        initialise(self, zero=[self.out])

    def forward(self, context: Tensor) -> Tensor:
        """Context latents `b t h w c` to forecast target latents `b t' h w c`."""
        tokens = self.context(context)  # b m d
        masks = expand_token(self.mask_token, len(tokens), self.geometry.target_tokens)  # b n d
        x = self.positions.add(torch.cat([tokens, masks], dim=1), "all")  # b m+n d
        for block in self.blocks:
            x = block(x, self.positions.rotary("all"))
        x = self.out(self.norm(x[:, self.geometry.context_tokens :]))
        return rearrange(x, "b (t h w) c -> b t h w c", h=self.geometry.height, w=self.geometry.width)
