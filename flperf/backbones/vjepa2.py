"""V-JEPA 2 (arXiv:2506.09985): bidirectional attention over tubelets of 2 x 16 x 16, the whole of what it is given at once."""

from einops import rearrange
from torch import Tensor, nn

from flperf.backbones.pretrained import load_transformer
from flperf.config import Backbone, UserError


class VJEPA2(nn.Module):
    """transformers' encoder without the predictor of its pre-training."""

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        from transformers import VJEPA2Config, VJEPA2Model

        if crop[0] != crop[1]:
            raise UserError(f"backbone.processor: V-JEPA 2 takes square clips, not {crop[0]} x {crop[1]}")
        # Its rotary positions are laid out on crop_size, so the configuration follows the preprocessing.
        model = load_transformer(VJEPA2Model, VJEPA2Config, backbone, crop_size=crop[0])
        self.encoder = model.encoder  # the masked-token predictor of pre-training is not kept
        self.blocks = self.encoder.layer
        self.frames_per_latent = self.frames_covered = model.config.tubelet_size
        self.patch_size = model.config.patch_size
        self.dim = model.config.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, b f c h w -> b t h w d."""
        tokens = self.encoder(pixels).last_hidden_state  # b (t h w) d
        height, width = (size // self.patch_size for size in pixels.shape[-2:])
        return rearrange(tokens, "b (t h w) d -> b t h w d", h=height, w=width)
