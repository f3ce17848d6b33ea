"""Layers of all heads: attention, rotary and sine positions, the transformer block, embeddings of tau and context.

Shapes in einops names: b batch, n tokens of the head's own sequence, m tokens of the context, d width, a attention
heads, k width of one attention head. All heads use one block: `modulated` adds adaLN-zero (DiT, arXiv:2212.09748,
section 3.2), `cross_attention` lets it read the context.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from flperf_kernels.adaln import residual_modulate
from torch import Tensor, nn

from flperf.models.attention import attention
from flperf.models.latents import LatentGeometry

ROTARY_BASE = 10_000.0
Rotary = tuple[Tensor, Tensor]  # cosine and sine, each fp32 [n, 1, k/2]


def token_coordinates(geometry: LatentGeometry) -> Tensor:
    """Integer (t, h, w) of every context token, then of every target token, on one time axis: [m + n, 3]."""
    axes = (range(geometry.context_frames + geometry.target_frames), range(geometry.height), range(geometry.width))
    return torch.cartesian_prod(*(torch.tensor(list(axis)) for axis in axes)).reshape(-1, 3)


def rotary_table(coordinates: Tensor, head_dim: int) -> Rotary:
    """Cosine and sine of the 3-D rotary embedding (RoFormer, arXiv:2104.09864, section 3.2.2, axis by axis), each [n,
    1, k/2].

    The k/2 rotated pairs are divided among t, h and w; t gets the remainder.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    angles = []
    for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
        frequencies = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(coordinates[:, axis : axis + 1].float() * frequencies)
    table = torch.cat(angles, dim=1)[:, None, :]
    return table.cos(), table.sin()


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate the pairs (i, i + k/2) of `b n a k` by each token's angles, in fp32."""
    if rotary is None:
        return x
    cosine, sine = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def split_heads(projected: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """`b n (parts a k)` to `parts` views `b n a k`.

    The parts are split where they lie. Moving them to the front first would make the backward pass write their
    gradients part by part, and copy them back to the layout of the projection.
    """
    return rearrange(projected, "b n (parts a k) -> b n parts a k", parts=parts, a=num_heads).unbind(2)


def sine_table(coordinates: Tensor, dim: int) -> Tensor:
    """Fixed sine and cosine features of (t, h, w), [n, d]: a third of the channels for each axis, zero in the rest."""
    count = dim // 6
    frequencies = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / count)
    angles = coordinates.float()[:, :, None] * frequencies  # n 3 count
    features = rearrange(torch.cat([angles.sin(), angles.cos()], dim=-1), "n xyz f -> n (xyz f)")
    return F.pad(features, (0, dim - features.shape[1]))


class Positions(nn.Module):
    """Positions of context and target tokens: rotary tables for attention, or sine features added to the tokens."""

    def __init__(self, kind: str, geometry: LatentGeometry, dim: int, num_heads: int):
        super().__init__()
        coordinates = token_coordinates(geometry)
        sequences = {
            "context": coordinates[: geometry.context_tokens],
            "target": coordinates[geometry.context_tokens :],
            "all": coordinates,
        }
        for sequence, tokens in sequences.items():
            cosine, sine = rotary_table(tokens, dim // num_heads) if kind == "rope3d" else (None, None)
            added = sine_table(tokens, dim) if kind == "sincos" else None
            self.register_buffer(f"{sequence}_cosine", cosine, persistent=False)
            self.register_buffer(f"{sequence}_sine", sine, persistent=False)
            self.register_buffer(f"{sequence}_added", added, persistent=False)

    def rotary(self, sequence: str) -> Rotary | None:
        """fp32 tables `[n, 1, k/2]` of the "context", "target" or "all" tokens; None where positions are not rotary."""
        cosine = getattr(self, f"{sequence}_cosine")
        return None if cosine is None else (cosine, getattr(self, f"{sequence}_sine"))

    def add(self, tokens: Tensor, sequence: str) -> Tensor:
        """The tokens `b n d` of a sequence plus the features of their positions, if positions are added at all."""
        added = getattr(self, f"{sequence}_added")
        return tokens if added is None else tokens + added.to(tokens.dtype)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to one another."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """b n d -> b n d."""
        query, key, value = split_heads(self.query_key_value(x), 3, self.num_heads)
        mixed = attention(rotate(query, rotary), rotate(key, rotary), value)
        return self.out(rearrange(mixed, "b n a k -> b n (a k)"))


class CrossAttention(nn.Module):
    """Attention of the head's own tokens to the context, whose keys and values come from `KeysValues`."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotary: Rotary | None, memory: tuple[Tensor, Tensor]) -> Tensor:
        """x `b n d`, keys and values `b m a k` each -> b n d."""
        query = rearrange(self.query(x), "b n (a k) -> b n a k", a=self.num_heads)
        mixed = attention(rotate(query, rotary), *memory)
        return self.out(rearrange(mixed, "b n a k -> b n (a k)"))


class KeysValues(nn.Module):
    """Keys and values of the context for one block. They are outside the block, so that a sampler computes them once
    for all steps."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.key_value = nn.Linear(dim, 2 * dim)

    def forward(self, context: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """context tokens `b m d` -> keys and values, `b m a k` each, keys rotated."""
        key, value = split_heads(self.key_value(context), 2, self.num_heads)
        return rotate(key, rotary), value


class MLP(nn.Sequential):
    """Two linear layers with GELU between them; the hidden layer is `ratio` times as wide."""

    def __init__(self, dim: int, ratio: float):
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Branch(nn.Module):
    """One residual branch: x + gate * layer(norm(x) * (1 + scale) + shift), or x + layer(norm(x)) with a learned norm
    if it is not modulated."""

    def __init__(self, dim: int, layer: nn.Module, modulated: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not modulated)
        self.layer = layer

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor] | None, *inputs) -> Tensor:
        """x `b n d`; modulation: shift, scale and gate, `b 1 d` each; inputs: further arguments of the layer."""
        if modulation is None:
            return x + self.layer(self.norm(x), *inputs)
        gate = modulation[2]  # b 1 d
        return x + gate * self.layer(self.modulated(x, modulation), *inputs)

    def modulated(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """The layer's input, `b n d`."""
        shift, scale, _ = modulation  # each b 1 d
        return self.norm(x) * (1 + scale) + shift


class Block(nn.Module):
    """Self-attention, optional cross-attention to the context, MLP: each a residual branch."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        cross_attention: bool = False,
        modulated: bool = False,
        fused: bool = False,
    ):
        super().__init__()
        self.fused = fused
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
        branches = [(self.self_attention, (rotary,)), (self.mlp, ())]
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
        if self.fused:
            return self._fused(x, branches, modulations)
        for (branch, inputs), modulation in zip(branches, modulations, strict=True):
            x = branch(x, modulation, *inputs)
        return x

    @staticmethod
    def _fused(x: Tensor, branches: list, modulations: tuple) -> Tensor:
        """The same computation, where one kernel computes a gated residual with the norm and modulation after it."""
        (branch, inputs), *others = branches
        h = branch.modulated(x, modulations[0])
        for index, (next_branch, next_inputs) in enumerate(others):
            gate, (shift, scale, _) = modulations[index][2], modulations[index + 1]
            x, h = residual_modulate(
                x, branch.layer(h, *inputs), *(m.squeeze(1).contiguous() for m in (gate, shift, scale))
            )
            branch, inputs = next_branch, next_inputs
        return x + modulations[-1][2] * branch.layer(h, *inputs)


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
