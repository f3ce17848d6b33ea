"""The usual way to train a head on a frozen encoder, as FutureLatents does it. Whole training steps are compared with
it.

It uses transformers' own backbone and flperf's head modules without fused kernels, and compiles nothing. Pixels are
normalised in fp32, as by the Hugging Face processor, and the whole clip is encoded at once. Weights are fp32, with or
without bf16 autocast. The optimizer is PyTorch's AdamW with its defaults, and the loss is read at every step. Cached
latents are read with `torch.load`, one file per clip, in a DataLoader.
"""

import csv
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import VJEPA2Config, VJEPA2Model

from flperf.config import Backbone, Config
from flperf.data.preprocessing import Preprocessing
from flperf.models.backbones.pretrained import load_transformer
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry


class TransformersVJEPA2(nn.Module):
    """transformers' own layers with the interface of `flperf.models.backbones.vjepa2.VJEPA2`."""

    def __init__(self, backbone: Backbone, crop: tuple[int, int]):
        super().__init__()
        model = load_transformer(VJEPA2Model, VJEPA2Config, backbone, crop_size=crop[0])
        self.encoder, self.blocks = model.encoder, model.encoder.layer
        self.frames_per_latent = self.frames_covered = model.config.tubelet_size
        self.patch_size, self.dim = model.config.patch_size, model.config.hidden_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `b f c h w` to latents `b t h w d`."""
        height, width = (size // self.patch_size for size in pixels.shape[-2:])
        return rearrange(self.encoder(pixels).last_hidden_state, "b (t h w) d -> b t h w d", h=height, w=width)


class UsualStep:
    """A training step. A call takes the next of `batches`, uint8 video `b f h w c` or latents `b d t h w`."""

    def __init__(
        self, config: Config, geometry: LatentGeometry, batches: Iterator[Tensor], device: torch.device, autocast: bool
    ):
        self.config, self.geometry, self.batches, self.device, self.autocast = (
            config,
            geometry,
            batches,
            device,
            autocast,
        )
        self.preprocessing = Preprocessing.of(config.backbone)
        self.encoder = (
            TransformersVJEPA2(config.backbone, self.preprocessing.size).to(device).requires_grad_(False).eval()
        )
        self.head = build_head(config.model, geometry, seed=config.seed, compile=False).to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=config.trainer.learning_rate)

    def __call__(self) -> float:
        batch = next(self.batches).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            latents = (
                self.encode(batch) if batch.dtype == torch.uint8 else rearrange(batch.float(), "b d t h w -> b t h w d")
            )
            latents = F.normalize(latents, dim=-1)
            loss = self.loss(latents[:, : self.geometry.context_frames], latents[:, self.geometry.context_frames :])
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), self.config.trainer.max_grad_norm)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(x, device=self.device)[:, None, None]
            for x in (self.preprocessing.mean, self.preprocessing.std)
        )
        pixels = rearrange(video, "b f h w c -> b f c h w").float() * self.preprocessing.rescale
        return self.encoder((pixels - mean) / std)

    def loss(self, context: Tensor, target: Tensor) -> Tensor:
        if self.config.objective.kind == "regression":
            return F.mse_loss(self.head(context), target)
        noise, tau = torch.randn_like(target), torch.rand(len(target), device=self.device)
        t = tau[:, None, None, None, None]
        return F.mse_loss(self.head(context, (1 - t) * noise + t * target, tau), target - noise)


PROCESSORS = {  # the dtype that frames are resized in; torchvision's processors resize bytes
    "processor in float": torch.float32,
    "processor on bytes": torch.uint8,
}


def processed(frames: Tensor, preprocessing: Preprocessing, dtype: torch.dtype) -> Tensor:
    """Uint8 frames `f h w c` to normalised fp32 `f c h w`, in the steps of the Hugging Face processor, each over whole
    frames; resized in `dtype`. The processor, too, scales mean and standard deviation instead of the pixels."""
    geometry = preprocessing.geometry(*frames.shape[1:3])
    resized = F.interpolate(frames.permute(0, 3, 1, 2).to(dtype), geometry.resized, mode="bilinear", antialias=True)
    if dtype.is_floating_point:
        resized = resized.round().clamp(0, 255)
    (top, left), (height, width) = geometry.offset, preprocessing.size
    cropped = resized[:, :, top : top + height, left : left + width].float()
    mean, std = (
        torch.tensor(x)[:, None, None] / preprocessing.rescale for x in (preprocessing.mean, preprocessing.std)
    )
    return cropped.sub(mean).div_(std)


class LatentFiles(torch.utils.data.Dataset):
    def __init__(self, manifest: Path):
        with open(manifest, newline="") as rows:
            self.paths = [manifest.parent / row["out_path"] for row in csv.DictReader(rows)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return torch.load(self.paths[index], weights_only=True)


def latent_batches(manifest: Path, batch: int, workers: int) -> Iterator[Tensor]:
    """Cached latents `b d t h w` in shuffled epochs, without end."""
    loader = torch.utils.data.DataLoader(
        LatentFiles(manifest), batch, shuffle=True, num_workers=workers, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader
