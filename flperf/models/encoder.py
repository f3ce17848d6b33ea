"""The frozen encoder: uint8 video `b f h w c` to latents `b t h w d`.

Pixels are normalised on the device in compiled code, so that transfers and prefetch buffers need only one byte per
channel. The backbones are in flperf/models/backbones.
"""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from flperf.config import Backbone
from flperf.data.preprocessing import Preprocessing
from flperf.errors import UserError
from flperf.models.backbones import BACKBONES
from flperf.models.compile import compile_forward
from flperf.models.latents import LatentGeometry


class PixelNormalisation(nn.Module):
    """(x * rescale - mean) / std as one multiplication and addition, uint8 `b f h w c` to `b f c h w` in `dtype`.

    It works on whole rows of pixels, since a loop over the three channels would not fill the vector units of a CPU.
    """

    def __init__(self, preprocessing: Preprocessing, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        mean, std, width = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std), preprocessing.size[1]
        self.register_buffer("scale", repeat(preprocessing.rescale / std, "c -> (w c)", w=width), persistent=False)
        self.register_buffer("shift", repeat(-mean / std, "c -> (w c)", w=width), persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        """uint8 `b f h w c` to `b f c h w`, a view whose channels are still adjacent in memory."""
        rows = rearrange(video, "b f h w c -> b f h (w c)").float() * self.scale + self.shift
        return rearrange(rows.to(self.dtype), "b f h (w c) -> b f c h w", c=3)


class Encoder(nn.Module):
    """Pixel normalisation and backbone, frozen and in eval mode. Raises `UserError` for an unknown backbone."""

    backbone: Any  # a class of BACKBONES

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
        """The number of video frames from one latent frame to the next."""
        return self.backbone.frames_per_latent

    @property
    def frames_covered(self) -> int:
        """The number of these that a latent frame is computed from, the first ones."""
        return self.backbone.frames_covered

    def latent_shape(self, frames: int) -> tuple[int, int, int, int]:
        """(t, h, w, d) of the latents of `frames` video frames."""
        height, width = (size // self.backbone.patch_size for size in self.resolution)
        return frames // self.frames_per_latent, height, width, self.backbone.dim

    def forward(self, video: Tensor) -> Tensor:
        """Video uint8 `b f h w c` to latents `b t h w d` in the encoder's dtype."""
        return self.backbone(self.normalise(video)).contiguous()


def build_encoder(
    backbone: Backbone, preprocessing: Preprocessing, *, dtype: torch.dtype, device: torch.device, compile: bool
) -> Encoder:
    """The frozen encoder on `device`. With `compile`, its blocks and pixel normalisation are compiled."""
    encoder = Encoder(backbone, preprocessing, dtype).to(device)
    if compile:
        compile_forward(encoder.normalise, "the encoder's pixel normalisation")
        for number, block in enumerate(encoder.backbone.blocks, start=1):
            compile_forward(block, f"encoder block {number}/{len(encoder.backbone.blocks)}")
    return encoder


@torch.no_grad()
def encode_clip(encoder: Encoder, video: Tensor, geometry: LatentGeometry, mode: str) -> tuple[Tensor, Tensor]:
    """Raw context and target latents, `b t h w d` each, of uint8 video `b f h w c`.

    Mode "split" encodes context and target separately. "joint" encodes the whole clip and splits the latents, as
    FutureLatents does; an encoder that attends over time then leaks the future into the context.
    """
    context_frames = geometry.context_frames * encoder.frames_per_latent
    last_frame = context_frames + geometry.target_frames * encoder.frames_per_latent
    if mode == "joint":
        latents = encoder(video[:, :last_frame])
        return latents[:, : geometry.context_frames], latents[:, geometry.context_frames :]
    context, target = video[:, :context_frames], video[:, context_frames:last_frame]
    if context.shape == target.shape:  # one call on twice the batch, and one compiled shape
        return encoder(torch.cat([context, target])).chunk(2)
    return encoder(context), encoder(target)
