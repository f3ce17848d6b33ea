"""V-JEPA 2 (arXiv:2506.09985): bidirectional attention over all tubelets of 2 x 16 x 16 of its input.

Blocks of our own use the weights of transformers. Queries, keys and values come from one product. The angles of the
rotary embedding are computed once for a clip. Computing them in every block took a quarter of the encoder's time on a
CPU.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flperf.config import Backbone
from flperf.errors import UserError
from flperf.models.attention import attention, split_heads
from flperf.models.backbones.pretrained import load_transformer
from flperf.models.backbones.tubelets import TubeletEmbedding


class VJEPA2(nn.Module):
    """transformers' encoder without the predictor of its pre-training."""

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        from transformers import VJEPA2Config, VJEPA2Model

        if crop[0] != crop[1]:
            raise UserError(f"backbone.processor: V-JEPA 2 takes square clips, not {crop[0]} x {crop[1]}")
        # Rotary positions depend on crop_size, so the configuration follows the preprocessing.
        model: Any = load_transformer(VJEPA2Model, VJEPA2Config, backbone, crop_size=crop[0])
        encoder = model.encoder  # the masked-token predictor of pre-training is not kept
        self.embedding, self.norm = TubeletEmbedding(encoder.embeddings.patch_embeddings.proj), encoder.layernorm
        self.blocks = nn.ModuleList(Block(layer) for layer in encoder.layer)
        self.frames_per_latent = self.frames_covered = model.config.tubelet_size
        self.patch_size = model.config.patch_size
        self.dim = model.config.hidden_size
        self.head_dim = self.dim // model.config.num_attention_heads

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, b f c h w -> b t h w d."""
        x = self.embedding(pixels)
        _, t, h, w, _ = x.shape
        cosine, sine = rotary_table(t, h, w, self.head_dim, x.device)
        x = rearrange(x, "b t h w d -> b (t h w) d")
        for block in self.blocks:
            x = block(x, cosine, sine)
        return rearrange(self.norm(x), "b (t h w) d -> b t h w d", t=t, h=h)


class Block(nn.Module):
    """A layer of transformers: x + attention(norm(x)), then x + MLP(norm(x)).

    transformers rotates the channels 2i and 2i + 1 of a head, which vector instructions read badly. So the rows of
    the query and key weights are reordered here, even channels first. Products of queries and keys don't depend on
    the order.
    """

    def __init__(self, layer: Any):
        super().__init__()
        source = layer.attention
        self.num_heads = source.num_attention_heads
        self.norm1, self.norm2, self.mlp, self.out = layer.norm1, layer.norm2, layer.mlp, source.proj
        dim, bias = source.hidden_size, source.query.bias is not None
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=bias)
        for name in ("weight", "bias") if bias else ("weight",):
            query, key, value = (getattr(linear, name).detach() for linear in (source.query, source.key, source.value))
            query, key = (rearrange(x, "(a k two) ... -> (a two k) ...", a=self.num_heads, two=2) for x in (query, key))
            setattr(self.query_key_value, name, nn.Parameter(torch.cat([query, key, value])))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """b n d -> b n d; cosine, sine: [n, 1, k]."""
        query, key, value = split_heads(self.query_key_value(self.norm1(x)), 3, self.num_heads)
        mixed = attention(rotate(query, cosine, sine), rotate(key, cosine, sine), value)
        x = x + self.out(rearrange(mixed, "b n a k -> b n (a k)"))
        return x + self.mlp(self.norm2(x))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs (i, i + k/2) of `b n a k` by cosine and sine [n, 1, k], in fp32."""
    first, second = x.float().chunk(2, dim=-1)
    return (x.float() * cosine + torch.cat([-second, first], dim=-1) * sine).to(x.dtype)


def rotary_table(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine for every token and channel of a head, even channels first, fp32 [t h w, 1, k].

    The published weights expect this layout: t, h and w have a third of the channels each, rounded down to pairs, and
    the rest is not rotated. The frequencies of a third follow one another twice, so the two channels of a pair are
    rotated by different angles.
    """
    count = head_dim // 3 // 2
    frequencies = 10_000.0 ** (-torch.arange(count, device=device) / count)
    coordinates = torch.cartesian_prod(*(torch.arange(size, device=device) for size in (frames, height, width)))
    angles = (coordinates[:, :, None] * frequencies.repeat(2)).flatten(1)  # [t h w, 3 * 2 * count]
    angles = F.pad(angles, (0, head_dim - angles.shape[1]))
    angles = rearrange(angles, "n (k two) -> n 1 (two k)", two=2)
    return angles.cos(), angles.sin()
