"""The parts all heads are built of: attention layers, rotary and sine positions, the transformer block, the embedding
of tau.

Shapes in einops names: b batch, n tokens of the head's own sequence, m tokens of the context, d width, a attention
heads, k width of one attention head. One block serves every head: `modulated` adds adaLN-zero (DiT, arXiv:2212.09748,
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
    """Integer (t, h, w) of every context token, then of every target token, t-major, on one time axis: [m + n, 3]."""
    axes = (range(geometry.context_frames + geometry.target_frames), range(geometry.height), range(geometry.width))
    return torch.cartesian_prod(*(torch.tensor(list(axis)) for axis in axes)).reshape(-1, 3)


def rotary_table(coordinates: Tensor, head_dim: int) -> Rotary:
    """Cosine and sine of 3-D rotary embedding (RoFormer, arXiv:2104.09864, section 3.2.2, one axis after another),
    each [n, 1, k/2].

    The k/2 rotated pairs are shared out among t, h and w; what does not divide by three goes to t.
    """
    pairs = head_dim // 2
    spatial = pairs // 3
    parts = []
    for axis, count in enumerate((pairs - 2 * spatial, spatial, spatial)):
        frequencies = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / max(count, 1))
        parts.append(coordinates[:, axis : axis + 1].float() * frequencies)
    angles = torch.cat(parts, dim=1)[:, None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Rotate the pairs (i, i + k/2) of `b n a k` by each token's angles, in fp32."""
    if rotary is None:
        return x
    cosine, sine = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(x.dtype)


def sine_table(coordinates: Tensor, dim: int) -> Tensor:
    """Fixed sine and cosine features of (t, h, w), [n, d]: a third of the channels an axis, what is left over stays
    zero."""
    count = dim // 6
    frequencies = ROTARY_BASE ** (-torch.arange(count, dtype=torch.float32) / count)
    angles = coordinates.float()[:, :, None] * frequencies  # n 3 count
    features = rearrange(torch.cat([angles.sin(), angles.cos()], dim=-1), "n xyz f -> n (xyz f)")
    return F.pad(features, (0, dim - features.shape[1]))


class Positions(nn.Module):
    """Tells context and target tokens where they are: rotary tables for attention, or sine features added to the
    tokens."""

    def __init__(self, kind: str, geometry: LatentGeometry, dim: int, num_heads: int):
        super().__init__()
        coordinates = token_coordinates(geometry)
        parts = {
            "context": coordinates[: geometry.context_tokens],
            "target": coordinates[geometry.context_tokens :],
            "all": coordinates,
        }
        for part, where in parts.items():
            cosine, sine = rotary_table(where, dim // num_heads) if kind == "rope3d" else (None, None)
            self.register_buffer(f"{part}_cosine", cosine, persistent=False)
            self.register_buffer(f"{part}_sine", sine, persistent=False)
            self.register_buffer(
                f"{part}_added", sine_table(where, dim) if kind == "sincos" else None, persistent=False
            )

    def rotary(self, part: str) -> Rotary | None:
        """fp32 tables `[n, 1, k/2]` for "context", "target" or "all" tokens; None where positions are not rotary."""
        cosine = getattr(self, f"{part}_cosine")
        return None if cosine is None else (cosine, getattr(self, f"{part}_sine"))

    def add(self, tokens: Tensor, part: str) -> Tensor:
        """tokens `b n d` with the features of their places added, where positions are added."""
        added = getattr(self, f"{part}_added")
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
        query, key, value = rearrange(
            self.query_key_value(x), "b n (three a k) -> three b n a k", three=3, a=self.num_heads
        ).unbind()
        mixed = attention(rotate(query, rotary), rotate(key, rotary), value)
        return self.out(rearrange(mixed, "b n a k -> b n (a k)"))


class CrossAttention(nn.Module):
    """Queries from the head's own tokens; keys and values come ready from `KeysValues`."""

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
    """One block's keys and values of the context. Apart from the block, so that a sampler computes them once a
    context, not once a step."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.key_value = nn.Linear(dim, 2 * dim)

    def forward(self, context: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """context tokens `b m d` -> keys and values, `b m a k` each, keys rotated."""
        key, value = rearrange(
            self.key_value(context), "b m (two a k) -> two b m a k", two=2, a=self.num_heads
        ).unbind()
        return rotate(key, rotary), value


class MLP(nn.Sequential):
    """Two layers with GELU between them, `ratio` times as wide inside."""

    def __init__(self, dim: int, ratio: float):
        hidden = int(dim * ratio)
        super().__init__(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Branch(nn.Module):
    """One residual branch: x + gate * layer(norm(x) * (1 + scale) + shift); without modulation x + layer(norm(x))
    with a learned norm."""

    def __init__(self, dim: int, layer: nn.Module, modulated: bool):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=not modulated)
        self.layer = layer

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor, Tensor] | None, *inputs) -> Tensor:
        """x `b n d`; modulation: shift, scale and gate, `b 1 d` each; inputs: what the layer takes besides."""
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
            parts = rearrange(
                self.modulation(F.silu(condition)),
                "b (branch three d) -> branch three b 1 d",
                branch=len(branches),
                three=3,
            )
            modulations = tuple(tuple(part.unbind()) for part in parts.unbind())
        if self.fused:
            return self._fused(x, branches, modulations)
        for (branch, inputs), modulation in zip(branches, modulations, strict=True):
            x = branch(x, modulation, *inputs)
        return x

    @staticmethod
    def _fused(x: Tensor, branches: list, modulations: tuple) -> Tensor:
        """The same sum, cut between the layers: a gated residual and the norm after it are one kernel, forward and
        backward."""
        (branch, inputs), *others = branches
        h = branch.modulated(x, modulations[0])
        for place, (following, following_inputs) in enumerate(others):
            gate, (shift, scale, _) = modulations[place][2], modulations[place + 1]
            x, h = residual_modulate(
                x, branch.layer(h, *inputs), *(m.squeeze(1).contiguous() for m in (gate, shift, scale))
            )
            branch, inputs = following, following_inputs
        return x + modulations[-1][2] * branch.layer(h, *inputs)


class TauEmbedding(nn.Module):
    """Sine features of the time tau in [0, 1] (fp32, scaled to [0, 1000] as DiT's 1,000 steps), then a two-layer MLP:
    [b] -> [b d]."""

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
    """One token [d] as `b n d`, for `count` places."""
    return repeat(token, "d -> b n d", b=batch, n=count)


def initialise(head: nn.Module, zero: list[nn.Linear]) -> None:
    """Truncated normal weights (0.02), zero biases, unit norms; the layers in `zero` start at zero: a fresh head
    forecasts the mean.

    Parameters are filled with NaN first: one that is forgotten here shows in the first loss.
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
