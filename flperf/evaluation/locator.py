"""A locator finds the bouncing shapes in latents. Trained on true latents and applied to forecast ones, it gives the
error of a forecast in pixels, at each latent frame ahead."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from flperf.config import Config
from flperf.data import BatchShare, Preprocessing, open_dataset
from flperf.data.bouncing_shapes import SHAPES, heatmap_centres, patch_heatmaps, to_pixels, to_unit
from flperf.data.samplers import ClipBatch
from flperf.engine.process import compute_dtype
from flperf.errors import UserError
from flperf.evaluation.metrics import Key, MeanAccumulator
from flperf.files import atomic_file, read_tensor_file
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.latents import EPSILON, Normaliser, latent_geometry
from flperf.run import Run

FORMAT = "flperf locator 1"
BATCH_SIZE, LEARNING_RATE = 32, 2e-3
VALIDATION_CLIPS = 64
REDUCED, HIDDEN = 16, 256  # channels


class Coordinates(nn.Module):
    """Regresses the centres: each patch is reduced to a few channels, and a two-layer MLP on all patches gives (x, y)
    of each shape in [-1, 1]."""

    def __init__(self, height: int, width: int, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.reduce = nn.Linear(dim, REDUCED)
        self.mlp = nn.Sequential(
            nn.Linear(height * width * REDUCED, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * len(SHAPES))
        )

    def forward(self, latents: Tensor) -> Tensor:
        """`n h w d` to centres `n 2 2` in [-1, 1]."""
        tokens = rearrange(self.reduce(latents), "n h w c -> n (h w c)")
        return rearrange(self.mlp(tokens), "n (shape xy) -> n shape xy", xy=2)

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Mean squared error in [-1, 1] for centres `n 2 2` in pixels."""
        return F.mse_loss(self(latents), to_unit(centres, self.image_size))

    def locate(self, latents: Tensor) -> Tensor:
        """`n h w d` to centres `n 2 2` in pixels of the canvas."""
        return to_pixels(self(latents), self.image_size)


class Heatmaps(nn.Module):
    """A two-layer MLP on each patch and its neighbours gives a logit per shape. The softmax over patches is a
    distribution, and its mean is the centre."""

    def __init__(self, height: int, width: int, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.mlp = nn.Sequential(nn.Conv2d(dim, HIDDEN, 3, padding=1), nn.GELU(), nn.Conv2d(HIDDEN, len(SHAPES), 1))

    def forward(self, latents: Tensor) -> Tensor:
        """`n h w d` to logits `n 2 h w`."""
        return self.mlp(rearrange(latents, "n h w d -> n d h w"))

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Cross-entropy with a distribution over patches whose mean is the true centre."""
        logits = self(latents)
        target = patch_heatmaps(centres, self.image_size, *logits.shape[-2:])
        return F.cross_entropy(
            rearrange(logits, "n shape h w -> (n shape) (h w)"), rearrange(target, "n shape h w -> (n shape) (h w)")
        )

    def locate(self, latents: Tensor) -> Tensor:
        """`n h w d` to centres `n 2 2` in pixels of the canvas."""
        logits = self(latents)
        return heatmap_centres(logits.flatten(-2).softmax(-1).view_as(logits), self.image_size)


LOCATORS = {"coordinates": Coordinates, "heatmap": Heatmaps}


class Locator(nn.Module):
    """A locator head of a `kind` for latent frames of shape `grid` (height, width, channels), with the mean and
    standard deviation of the latents it was trained on."""

    def __init__(self, kind: str, grid: tuple[int, int, int], image_size: int):
        super().__init__()
        self.kind, self.grid = kind, grid
        self.register_buffer("mean", torch.zeros(grid[2]))
        self.register_buffer("std", torch.ones(grid[2]))
        self.head = LOCATORS[kind](*grid, image_size)

    def standardise(self, latents: Tensor) -> Tensor:
        """`… d` to the same shape in fp32."""
        return (latents.float() - self.mean) / self.std

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Loss of the head for latents `n h w d` and centres `n 2 2` in pixels."""
        return self.head.loss(self.standardise(latents), centres)

    def locate(self, latents: Tensor) -> Tensor:
        """Latents `… h w d` to centres `… 2 2`: (x, y) of the square and of the disk in pixels of the canvas."""
        located = self.head.locate(self.standardise(latents.flatten(0, -4)))
        return located.view(*latents.shape[:-3], *located.shape[1:])


def frame_centres(centres: Tensor, encoder: Encoder) -> Tensor:
    """Centres `b f 2 2` of video frames to centres `b t 2 2` of latent frames: means over the video frames that each
    latent frame is computed from."""
    frames = rearrange(centres, "b (t p) shape xy -> b t p shape xy", p=encoder.frames_per_latent)
    return frames[:, :, : encoder.frames_covered].mean(2)


class FrameLatents:
    """Training data of a locator: single latent frames with the true centres of the shapes.

    Latents are normalised as in training of a head, but not standardised. A dataset of single images works too: an
    image is repeated for all the video frames of a latent frame. Raises `UserError` for other data than shapes.
    """

    def __init__(self, config: Config, device: torch.device):
        if config.dataset.kind != "bouncing_shapes":
            raise UserError(
                "dataset.kind: a locator needs bouncing_shapes, whose positions are known; it is "
                f"{config.dataset.kind!r}"
            )
        self.config, self.device = config, device
        preprocessing = Preprocessing.of(config.backbone)
        self.dataset = open_dataset(config, preprocessing, config.seed)
        dtype = compute_dtype(config.engine.precision, device)
        self.encoder = build_encoder(
            config.backbone, preprocessing, dtype=dtype, device=device, compile=config.engine.compile
        )
        self.repeats = self.encoder.frames_per_latent if config.dataset.n_frames == 1 else 1
        self.frames, height, width, dim = self.encoder.latent_shape(config.dataset.n_frames * self.repeats)
        self.grid = height, width, dim
        self.normaliser = Normaliser(norm_before_standardisation(config), torch.float32)

    @torch.no_grad()
    def encode(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Latents `n h w d` and centres `n 2 2` in pixels, of all n latent frames of a batch."""
        video, centres = (
            repeat(part.to(self.device), "b f ... -> b (f r) ...", r=self.repeats)
            for part in (batch.video, batch.centres)
        )
        if self.frames == 1:
            latents = self.encoder(video)
        else:
            geometry = latent_geometry(self.config, self.frames, *self.grid)
            latents = torch.cat(encode_clip(self.encoder, video, geometry, self.config.backbone.encode), dim=1)
        centres = frame_centres(centres, self.encoder)[:, : latents.shape[1]]
        return self.normaliser(latents).flatten(0, 1), centres.flatten(0, 1)


def norm_before_standardisation(config: Config) -> str:
    """Statistics differ from run to run, so a locator takes latents that are not standardised and has its own."""
    norm = config.latents.embedding_norm
    return "none" if norm == "standardize" else norm


def train_locator(config: Config, kind: str, steps: int, device: torch.device) -> tuple[Locator, float]:
    """A locator trained on the training split for `steps` updates, and its mean error in pixels on validation clips.
    Raises `UserError` for an unknown kind."""
    if kind not in LOCATORS:
        raise UserError(f"--head: {kind!r} is unknown; known: {', '.join(LOCATORS)}")
    frames = FrameLatents(config, device)
    torch.manual_seed(config.seed)
    locator = Locator(kind, frames.grid, config.dataset.shapes.image_size).to(device)
    optimizer = torch.optim.AdamW(locator.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    share = BatchShare(0, 1, BATCH_SIZE, BATCH_SIZE)
    batches = frames.dataset.train_batches(0, share, device)
    for step in (bar := tqdm(range(steps), "locator", disable=None)):
        latents, centres = frames.encode(next(batches))
        if step == 0:
            locator.mean.copy_(latents.mean((0, 1, 2)))
            locator.std.copy_(latents.std((0, 1, 2)).clamp(min=EPSILON))
        loss = locator.loss(latents, centres)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")
    locator.requires_grad_(False).eval()
    return locator, validation_error(locator, frames, share)


def validation_error(locator: Locator, frames: FrameLatents, share: BatchShare) -> float:
    """Mean error in pixels on the first `VALIDATION_CLIPS` validation clips."""
    errors = []
    for batch in frames.dataset.validation_batches(share, BATCH_SIZE, VALIDATION_CLIPS, frames.device):
        latents, centres = frames.encode(batch)
        error = pixel_errors(locator.locate(latents), centres).view(len(batch.valid), -1)
        errors.append(error[batch.valid.to(frames.device)].flatten())
    return torch.cat(errors).mean().item()


def pixel_errors(located: Tensor, centres: Tensor) -> Tensor:
    """Distance between located and true centres `… 2 2`, averaged over the shapes: `…`."""
    return (located - centres).norm(dim=-1).mean(-1)


def identity(config: Config) -> dict:
    """The settings that a locator and an evaluated run must have in common."""
    backbone = asdict(config.backbone)
    del backbone["encode"]  # a locator also works on jointly encoded latents; its error on the true ones shows how well
    norm = norm_before_standardisation(config)
    return {"backbone": backbone, "embedding_norm": norm, "image_size": config.dataset.shapes.image_size}


def save_locator(path: Path, locator: Locator, config: Config) -> None:
    """Write a locator that was trained on `config` as a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": FORMAT,
        "head": locator.kind,
        "grid": json.dumps(locator.grid),
        "identity": json.dumps(identity(config)),
    }
    with atomic_file(path) as unfinished:
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in locator.state_dict().items()}, unfinished, metadata
        )


def load_locator(path: str | Path, config: Config, device: torch.device) -> Locator:
    """Read what `save_locator` wrote. Raises `UserError` if the file is not a locator, or if the locator was trained
    with another encoder, normalisation or canvas than those of `config`."""
    weights, metadata = read_tensor_file(path, FORMAT, "flperf locator", device)
    trained, needed = json.loads(metadata["identity"]), identity(config)
    wrong = [f"{key} {trained[key]!r} (here {value!r})" for key, value in needed.items() if trained[key] != value]
    if wrong:
        raise UserError(f"{path}: this locator was trained with another encoder or canvas: {'; '.join(wrong)}")
    locator = Locator(metadata["head"], tuple(json.loads(metadata["grid"])), trained["image_size"]).to(device)
    locator.load_state_dict(weights)
    return locator.requires_grad_(False).eval()


class PixelErrors:
    """An observer that measures how far from the true centres a locator finds the shapes, in forecast, repeated and
    true latents. Raises `UserError` for other data than shapes."""

    def __init__(self, locator: Locator, run: Run):
        if run.config.dataset.kind != "bouncing_shapes":
            raise UserError(
                "--locator: needs bouncing_shapes, whose positions are known; dataset.kind is "
                f"{run.config.dataset.kind!r}"
            )
        assert run.encoder is not None  # these clips are drawn
        self.locator, self.run, self.encoder = locator, run, run.encoder
        self.means = MeanAccumulator(run.process.device)

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """Add a batch: normalised latents by name, fp32 `b t h w d` (t may be 1)."""
        geometry, device = self.run.geometry, self.run.process.device
        centres = frame_centres(batch.centres.to(device), self.encoder)
        centres = centres[:, geometry.context_frames : geometry.context_frames + geometry.target_frames]
        errors: dict[Key, Tensor] = {
            name: pixel_errors(self.locator.locate(self._raw(values)), centres) for name, values in latents.items()
        }
        self.means.add(errors, batch.valid.to(device))

    def _raw(self, latents: Tensor) -> Tensor:
        normaliser = self.run.normaliser
        return latents * normaliser.std + normaliser.mean if normaliser.kind == "standardize" else latents

    def result(self) -> dict[str, list[float]]:
        """The mean error in pixels of the canvas at each latent frame ahead, by name, over all processes."""
        return {str(name): mean.tolist() for name, mean in self.means.means().items()}


def locator_summary(errors: dict[str, list[float]]) -> str:
    """The result of `PixelErrors` as a few lines of text."""
    labels = {"forecast": "forecast", "sample": "one sample", "copy_last": "copy last", "target": "true latents"}
    shown = {label: errors[name] for name, label in labels.items() if name in errors}
    rows = [f"{label:>14}" + "".join(f"{error:9.1f}" for error in ahead) for label, ahead in shown.items()]
    return "\n".join(["error of the shapes' positions in pixels, by latent frame ahead:", *rows])
