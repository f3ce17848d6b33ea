"""The frozen encoder behind one function: uint8 video `b f h w c` in, latents `b t h w d` out.

Pixels are normalised inside the compiled graph, so that what crosses the bus and fills the prefetch buffers is one byte a channel.
A new backbone is a class with the six members of `VJEPA2` and a line in the table.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from flperf.compilation import compile_forward
from flperf.config import Backbone, UserError
from flperf.data.preprocessing import Preprocessing
from flperf.latents import Layout


class VJEPA2(nn.Module):
    """V-JEPA 2 (arXiv:2506.09985): bidirectional attention over tubelets of 2 x 16 x 16, the whole of what it is given at once."""

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        from transformers import VJEPA2Config, VJEPA2Model

        if crop[0] != crop[1]:
            raise UserError(f"backbone.processor: V-JEPA 2 takes square clips, not {crop[0]} x {crop[1]}")
        # Its rotary positions are laid out on crop_size, so the configuration follows the preprocessing.
        model = load_transformer(VJEPA2Model, VJEPA2Config, backbone, crop_size=crop[0])
        self.encoder = model.encoder  # the masked-token predictor of pre-training is not kept
        self.blocks = self.encoder.layer
        self.frames_per_latent = model.config.tubelet_size
        self.patch_size = model.config.patch_size
        self.dim = model.config.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: normalised, b f c h w -> b t h w d."""
        tokens = self.encoder(pixels).last_hidden_state  # b (t h w) d
        height, width = (size // self.patch_size for size in pixels.shape[-2:])
        return rearrange(tokens, "b (t h w) d -> b t h w d", h=height, w=width)


class DINOv3(nn.Module):
    """DINOv3 (arXiv:2508.10104), frame by frame: every `frame_stride`-th frame, patch tokens only (class and register tokens dropped)."""

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        self.encoder = load_transformer(DINOv3ViTModel, DINOv3ViTConfig, backbone, image_size=crop[0])
        self.blocks = self.encoder.model.layer
        self.frames_per_latent = backbone.frame_stride
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


BACKBONES = {"vjepa2": VJEPA2, "dinov3": DINOv3}


class PixelNormalisation(nn.Module):
    """(x * rescale - mean) / std as one multiply and add: uint8 b f h w c -> b f c h w in `dtype`."""

    def __init__(self, preprocessing: Preprocessing, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
        self.register_buffer("scale", (preprocessing.rescale / std)[:, None, None], persistent=False)
        self.register_buffer("shift", (-mean / std)[:, None, None], persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        return (rearrange(video, "b f h w c -> b f c h w").float() * self.scale + self.shift).to(self.dtype)


class Encoder(nn.Module):
    """Normalisation and backbone, frozen, in eval mode."""

    def __init__(self, backbone: Backbone, preprocessing: Preprocessing, dtype: torch.dtype):
        super().__init__()
        if backbone.kind not in BACKBONES:
            raise UserError(f"backbone.kind: {backbone.kind!r} is unknown; known: {', '.join(BACKBONES)}")
        self.resolution = preprocessing.size
        self.backbone = BACKBONES[backbone.kind](backbone, self.resolution).to(dtype)
        self.normalise = PixelNormalisation(preprocessing, dtype)
        self.requires_grad_(False).eval()

    @property
    def frames_per_latent(self) -> int:
        return self.backbone.frames_per_latent

    def latent_shape(self, frames: int) -> tuple[int, int, int, int]:
        """(t, h, w, d) of the latents of `frames` video frames."""
        height, width = (size // self.backbone.patch_size for size in self.resolution)
        return frames // self.frames_per_latent, height, width, self.backbone.dim

    def forward(self, video: Tensor) -> Tensor:
        """video: uint8 b f h w c -> latents b t h w d in the encoder's dtype."""
        return self.backbone(self.normalise(video)).contiguous()


def build_encoder(backbone: Backbone, preprocessing: Preprocessing, *, dtype: torch.dtype, device: torch.device, compile: bool) -> Encoder:
    """The frozen encoder on `device`, its blocks and its pixel normalisation compiled."""
    encoder = Encoder(backbone, preprocessing, dtype).to(device)
    if compile:
        for module in (encoder.normalise, *encoder.backbone.blocks):
            compile_forward(module)
    return encoder


@torch.no_grad()
def encode_clip(encoder: Encoder, video: Tensor, layout: Layout, mode: str) -> tuple[Tensor, Tensor]:
    """Raw context and target latents, `b t h w d` each, of uint8 video `b f h w c`.

    mode "split" encodes the context frames by themselves, so that nothing of the target can reach the context; "joint" encodes the
    clip as a whole and splits the latents, as FutureLatents does: an encoder that attends over time then leaks the future.
    """
    context_frames = layout.context_frames * encoder.frames_per_latent
    last_frame = context_frames + layout.target_frames * encoder.frames_per_latent
    if mode == "joint":
        latents = encoder(video[:, :last_frame])
        return latents[:, : layout.context_frames], latents[:, layout.context_frames :]
    context, target = video[:, :context_frames], video[:, context_frames:last_frame]
    if context.shape == target.shape:  # one call on a double batch, one compilation
        return encoder(torch.cat([context, target])).chunk(2)
    return encoder(context), encoder(target)


def load_transformer(model_class, config_class, backbone: Backbone, **geometry) -> nn.Module:
    """A transformers model from `backbone.weights`, or with seeded random weights from `backbone.architecture`."""
    if backbone.weights is None:
        # transformers keeps unknown arguments without a word, so a misspelt one would silently mean its default.
        architecture = {key: value for key, value in backbone.architecture.items() if value is not None}
        for key in architecture.keys() - config_class().to_dict().keys():
            raise UserError(f"backbone.architecture.{key}: {config_class.__name__} has no such argument")
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return model_class(config_class(**{**architecture, **geometry}, attn_implementation="sdpa"))
        except (TypeError, ValueError) as error:
            raise UserError(f"backbone.architecture: {' '.join(str(error).split())}") from error
    try:
        return model_class.from_pretrained(backbone.weights, **geometry, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone.weights: {backbone.weights!r} is neither a local folder with a {backbone.kind} checkpoint nor a hub name that "
            f"can be reached ({reason}); download it, or set backbone.weights to the folder"
        ) from error
