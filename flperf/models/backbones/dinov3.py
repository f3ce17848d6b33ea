"""DINOv3 (arXiv:2508.10104), frame by frame: every `frame_stride`-th frame, patch tokens only (class and register
tokens dropped)."""

from einops import rearrange
from torch import Tensor, nn

from flperf.config import Backbone
from flperf.models.backbones.pretrained import load_transformer


class DINOv3(nn.Module):
    """transformers' ViT on every `frame_stride`-th frame.

    It keeps PyTorch's attention. transformers' layout is `b a n k`, which xFormers would copy, and attention is just
    n / (6 d + n) of the arithmetic: 4% for a frame of 256 x 256 (n = 261 tokens) at width 1024.
    """

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        self.encoder = load_transformer(DINOv3ViTModel, DINOv3ViTConfig, backbone, image_size=crop[0])
        self.blocks = self.encoder.model.layer
        self.frames_per_latent, self.frames_covered = backbone.frame_stride, 1
        self.patch_size = self.encoder.config.patch_size
        self.dim = self.encoder.config.hidden_size
        self.prefix_tokens = 1 + self.encoder.config.num_register_tokens

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, b f c h w -> b t h w d."""
        batch = len(pixels)
        frames = rearrange(pixels[:, :: self.frames_per_latent], "b t c h w -> (b t) c h w")
        tokens = self.encoder(frames).last_hidden_state[:, self.prefix_tokens :]  # (b t) (h w) d
        height, width = (size // self.patch_size for size in pixels.shape[-2:])
        return rearrange(tokens, "(b t) (h w) d -> b t h w d", b=batch, h=height, w=width)
