"""Layers of all heads: attention, the transformer block, embeddings of tau and context.

Shapes in einops names: b batch, n tokens of the head's own sequence, m tokens of the context, d width, a attention
heads, k width of one attention head. All heads use one block: `modulated` adds adaLN-zero (DiT, arXiv:2212.09748,
section 3.2), `cross_attention` lets it read the context.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from flperf.models.attention import attention, split_heads
from flperf.models.heads import fused
from flperf.models.heads.positions import ROTARY_BASE, Rotary, rotate

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, scale and gate, each `b 1 d`


class HeadProjection(fused.Fusable, nn.Linear):
    """Queries, keys and values, or some of them, in one product: `b n d` to `parts` tensors `b n a k`. The first
    `rotated` are rotated."""

    def __init__(self, dim: int, num_heads: int, *, parts: int, rotated: int):
        super().__init__(dim, parts * dim)
        self.num_heads, self.parts, self.rotated = num_heads, parts, rotated

    def forward(self, x: Tensor, rotary: Rotary | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        if self.fuses(x) and self.out_features // (self.parts * self.num_heads) % 2 == 0:
            tables = rotary or (None, None)
            return fused.Heads.apply(
                fused.product(self, x), self.bias, *tables, self.parts, self.rotated, self.num_heads
            )
        split = split_heads(super().forward(x), self.parts, self.num_heads)
        return (*(rotate(part, rotary) for part in split[: self.rotated]), *split[self.rotated :])


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to one another."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.query_key_value = HeadProjection(dim, num_heads, parts=3, rotated=2)
        self.out = nn.Linear(dim, dim)

    def mix(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """What `out` takes: b n d -> b n d."""
        query, key, value = self.query_key_value(x, rotary)
        return rearrange(attention(query, key, value), "b n a k -> b n (a k)")

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """b n d -> b n d."""
        return self.out(self.mix(x, rotary))


class CrossAttention(nn.Module):
    """Attention of the head's own tokens to the context, whose keys and values come from `KeysValues`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.query = HeadProjection(dim, num_heads, parts=1, rotated=1)
        self.out = nn.Linear(dim, dim)

    def mix(self, x: Tensor, rotary: Rotary | None, memory: tuple[Tensor, Tensor]) -> Tensor:
        """What `out` takes: x `b n d`, keys and values `b m a k` each -> b n d."""
        (query,) = self.query(x, rotary)
        return rearrange(attention(query, *memory), "b n a k -> b n (a k)")

    def forward(self, x: Tensor, rotary: Rotary | None, memory: tuple[Tensor, Tensor]) -> Tensor:
        """x `b n d`, keys and values `b m a k` each -> b n d."""
        return self.out(self.mix(x, rotary, memory))


class KeysValues(nn.Module):
    """Keys and values of the context for one block. They are outside the block, so that a sampler computes them once
    for all steps."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.key_value = HeadProjection(dim, num_heads, parts=2, rotated=1)

    def forward(self, context: Tensor, rotary: Rotary | None) -> tuple[Tensor, ...]:
        """context tokens `b m d` -> keys and values, `b m a k` each, keys rotated."""
        return self.key_value(context, rotary)


class MLP(fused.Fusable, nn.Sequential):
    """Two linear layers with GELU between them; the hidden layer is `ratio` times as wide."""

    def __init__(self, dim: int, ratio: float):
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    @property
    def out(self) -> nn.Module:
        return self[2]

    def mix(self, x: Tensor) -> Tensor:
        """What `out` takes: b n d -> b n (ratio d)."""
        first: Any = self[0]
        return fused.GELU.apply(fused.product(first, x), first.bias) if self.fuses(x) else self[1](first(x))


class Branch(nn.Module):
    """One residual branch: x + gate * layer(norm(x) * (1 + scale) + shift), or x + layer(norm(x)) with a learned norm
    if it is not modulated. The layer ends with a linear one, `out`, on what its `mix` returns."""

    def __init__(self, dim: int, layer: Any, modulated: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not modulated)
        self.layer = layer

    def forward(self, x: Tensor, modulation: Modulation | None, *inputs: Any) -> Tensor:
        """x `b n d`; inputs: further arguments of the layer."""
        if modulation is None:
            return x + self.layer(self.norm(x), *inputs)
        shift, scale, gate = modulation
        return x + gate * self.layer(self.norm(x) * (1 + scale) + shift, *inputs)

    def residual_norm(
        self, x: Tensor, residual: fused.Residual | None, modulation: Modulation | None
    ) -> tuple[Tensor, Tensor]:
        """x plus the residual of the branch before, if there is one, and what the layer takes, `b n d` each."""
        shift, scale = (self.norm.bias, self.norm.weight) if modulation is None else modulation[:2]
        one = 0.0 if modulation is None else 1.0
        return fused.ResidualNorm.apply(x, *(residual or (None, None, None)), shift, scale, one, self.norm.eps)


class Block(fused.Fusable, nn.Module):
    """Self-attention, optional cross-attention to the context, MLP: each a residual branch."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, *, cross_attention: bool = False, modulated: bool = False
    ):
        super().__init__()
        self.self_attention = Branch(dim, SelfAttention(dim, num_heads), modulated)
        self.cross_attention = Branch(dim, CrossAttention(dim, num_heads), modulated) if cross_attention else None
        self.mlp = Branch(dim, MLP(dim, mlp_ratio), modulated)
        self.modulation = nn.Linear(dim, (9 if cross_attention else 6) * dim) if modulated else None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        memory: tuple[Tensor, Tensor] | None = None,
        condition: Tensor | None = None,
    ) -> Tensor:
        """x: b n d. memory: keys and values of the context, `b m a k` each. condition: b d."""
        branches: list[tuple[Branch, tuple]] = [(self.self_attention, (rotary,)), (self.mlp, ())]
        if self.cross_attention is not None:
            branches.insert(1, (self.cross_attention, (rotary, memory)))
        modulations: tuple = (None,) * len(branches)
        if self.modulation is not None:
            assert condition is not None  # a modulated block has one
            projected = rearrange(
                self.modulation(F.silu(condition)),
                "b (branch three d) -> branch three b 1 d",
                branch=len(branches),
                three=3,
            )
            modulations = tuple(tuple(modulation.unbind()) for modulation in projected.unbind())
        if self.fuses(x):
            return self._fused(x, branches, modulations)
        for (branch, inputs), modulation in zip(branches, modulations, strict=True):
            x = branch(x, modulation, *inputs)
        return x

    @staticmethod
    def _fused(x: Tensor, branches: list[tuple[Branch, tuple]], modulations: tuple) -> Tensor:
        """The same computation in other steps: the residual of each branch is added with the norm of the next one."""
        residual: fused.Residual | None = None
        for (branch, inputs), modulation in zip(branches, modulations, strict=True):
            x, h = branch.residual_norm(x, residual, modulation)
            out, gate = branch.layer.out, None if modulation is None else modulation[2]
            residual = fused.product(out, branch.layer.mix(h, *inputs)), out.bias, gate
        assert residual is not None
        return fused.AddResidual.apply(x, *residual)


class TauEmbedding(nn.Module):
    """Sine features of tau in [0, 1] (fp32, scaled to [0, 1000] as DiT's 1,000 steps), then a two-layer MLP: b -> b
    d."""

    FEATURES = 256

    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, tau: Tensor) -> Tensor:
        """tau [b] -> b d."""
        half = self.FEATURES // 2
        frequencies = ROTARY_BASE ** (-torch.arange(half, device=tau.device, dtype=torch.float32) / half)
        angles = 1000.0 * tau.float()[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class ContextEmbedding(nn.Module):
    """Context latents to tokens of the head's width: b t h w c -> b m d."""

    def __init__(self, latent_dim: int, dim: int):
        super().__init__()
        self.project = nn.Linear(latent_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, context: Tensor) -> Tensor:
        """b t h w c -> b m d."""
        return self.norm(self.project(rearrange(context, "b t h w c -> b (t h w) c")))


def learned_token(*shape: int) -> nn.Parameter:
    """A parameter that `initialise` fills."""
    return nn.Parameter(torch.empty(*shape))


def expand_token(token: Tensor, batch: int, count: int) -> Tensor:
    """One token [d] repeated to `b n d`; n is `count`."""
    return repeat(token, "d -> b n d", b=batch, n=count)


def initialise(head: nn.Module, zero: list[nn.Linear]) -> None:
    """Initialise a head: truncated normal weights (0.02), zero biases, unit norms. The layers in `zero` start at
    zero, so that a fresh head forecasts the mean.

    Parameters are filled with NaN first, so one that is forgotten here shows in the first loss.
    """
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.fill_(float("nan"))
        for module in head.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_token") or name.endswith("_queries"):
                    nn.init.trunc_normal_(parameter, std=0.02)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
