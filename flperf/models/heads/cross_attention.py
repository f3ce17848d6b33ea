"""Cross-attention predictor: one learned query for each target token reads the context, which is never updated.

It is cheaper than the predictor for a long context: no queries come from context tokens.
"""

from einops import rearrange, repeat
from torch import Tensor, nn

from flperf.config import Model
from flperf.models.heads.layers import Block, ContextEmbedding, KeysValues, initialise, learned_token
from flperf.models.heads.positions import Positions
from flperf.models.latents import LatentGeometry


class CrossAttentionPredictor(nn.Module):
    """Learned queries that read the context in every block; needs regression."""

    def __init__(self, model: Model, geometry: LatentGeometry):
        super().__init__()
        self.geometry = geometry
        self.positions = Positions(model.positions, geometry, model.hidden_dim, model.num_heads)
        self.context = ContextEmbedding(geometry.dim, model.hidden_dim)
        self.target_queries = learned_token(geometry.target_tokens, model.hidden_dim)
        self.memory = nn.ModuleList(KeysValues(model.hidden_dim, model.num_heads) for _ in range(model.depth))
        self.blocks = nn.ModuleList(
            Block(model.hidden_dim, model.num_heads, model.mlp_ratio, cross_attention=True) for _ in range(model.depth)
        )
        self.norm = nn.LayerNorm(model.hidden_dim, eps=1e-6)
        self.out = nn.Linear(model.hidden_dim, geometry.dim)
        initialise(self, zero=[self.out])

    def forward(self, context: Tensor) -> Tensor:
        """Context latents `b t h w c` to forecast target latents `b t' h w c`."""
        tokens = self.positions.add(self.context(context), "context")  # b m d
        # Contiguous, so that the first block's input has the strides of the others', and they share a compilation.
        x = self.positions.add(repeat(self.target_queries, "n d -> b n d", b=len(tokens)), "target").contiguous()
        for block, keys_values in zip(self.blocks, self.memory, strict=True):
            x = block(x, self.positions.rotary("target"), keys_values(tokens, self.positions.rotary("context")))
        return rearrange(
            self.out(self.norm(x)), "b (t h w) c -> b t h w c", h=self.geometry.height, w=self.geometry.width
        )
