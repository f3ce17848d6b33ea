"""Does a forecast know where things will be? A locator finds the bouncing shapes in true latents; put to forecast
ones, it tells the error in pixels at every horizon."""

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
from flperf.evaluation.metrics import MeanAccumulator
from flperf.files import atomic_file, read_tensor_file
from flperf.models.encoder import Encoder, build_encoder, encode_clip
from flperf.models.latents import EPSILON, Normaliser, latent_geometry
from flperf.run import Run

FORMAT = "flperf locator 1"
BATCH_SIZE, LEARNING_RATE = 32, 2e-3
CHECKED_CLIPS = 64  # of the validation split

REDUCED, HIDDEN = 16, 256  # channels


class Coordinates(nn.Module):
    """A two-layer MLP on all patches, each reduced to a few channels first, to (x, y) in [-1, 1]."""

    def __init__(self, height: int, width: int, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.reduce = nn.Linear(dim, REDUCED)
        self.mlp = nn.Sequential(
            nn.Linear(height * width * REDUCED, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 2 * len(SHAPES))
        )

    def forward(self, latents: Tensor) -> Tensor:
        tokens = rearrange(self.reduce(latents), "n h w c -> n (h w c)")
        return rearrange(self.mlp(tokens), "n (shape xy) -> n shape xy", xy=2)

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Mean squared error in [-1, 1] of centres `n 2 2` in pixels."""
        return F.mse_loss(self(latents), to_unit(centres, self.image_size))

    def locate(self, latents: Tensor) -> Tensor:
        """`n h w d` to centres `n 2 2` in pixels of the canvas."""
        return to_pixels(self(latents), self.image_size)


class Heatmaps(nn.Module):
    """A two-layer MLP on each patch and its neighbours to a logit a shape; the centre is the mean of the distribution
    over patches."""

    def __init__(self, height: int, width: int, dim: int, image_size: int):
        super().__init__()
        self.image_size = image_size
        self.mlp = nn.Sequential(nn.Conv2d(dim, HIDDEN, 3, padding=1), nn.GELU(), nn.Conv2d(HIDDEN, len(SHAPES), 1))

    def forward(self, latents: Tensor) -> Tensor:
        """Logits `n 2 h w`."""
        return self.mlp(rearrange(latents, "n h w d -> n d h w"))

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        """Cross-entropy with the distribution over patches whose mean is the centre."""
        logits = self(latents)
        wanted = patch_heatmaps(centres, self.image_size, *logits.shape[-2:])
        return F.cross_entropy(
            rearrange(logits, "n shape h w -> (n shape) (h w)"), rearrange(wanted, "n shape h w -> (n shape) (h w)")
        )

    def locate(self, latents: Tensor) -> Tensor:
        logits = self(latents)
        return heatmap_centres(logits.flatten(-2).softmax(-1).view_as(logits), self.image_size)


LOCATORS = {"coordinates": Coordinates, "heatmap": Heatmaps}


class Locator(nn.Module):
    """One of them for a grid of (height, width, channels), with the mean and standard deviation of the latents that
    it was trained on."""

    def __init__(self, kind: str, grid: tuple[int, int, int], image_size: int):
        super().__init__()
        self.kind, self.grid = kind, grid
        self.register_buffer("mean", torch.zeros(grid[2]))
        self.register_buffer("std", torch.ones(grid[2]))
        self.head = LOCATORS[kind](*grid, image_size)

    def standardise(self, latents: Tensor) -> Tensor:
        return (latents.float() - self.mean) / self.std

    def loss(self, latents: Tensor, centres: Tensor) -> Tensor:
        return self.head.loss(self.standardise(latents), centres)

    def locate(self, latents: Tensor) -> Tensor:
        """Latents `… h w d` to centres `… 2 2` of square and disk, (x, y) in pixels of the canvas."""
        located = self.head.locate(self.standardise(latents.flatten(0, -4)))
        return located.view(*latents.shape[:-3], *located.shape[1:])


def frame_centres(centres: Tensor, encoder: Encoder) -> Tensor:
    """Centres `b f 2 2` of video frames to those of latent frames, `b t 2 2`: the mean over the frames that each is
    computed from."""
    frames = rearrange(centres, "b (t p) shape xy -> b t p shape xy", p=encoder.frames_per_latent)
    return frames[:, :, : encoder.frames_covered].mean(2)


class FrameLatents:
    """Latents of single frames with the true centres, as forecasts of a configuration have them but for
    standardisation.

    A single image is repeated to as many frames as a latent frame has.
    """

    def __init__(self, config: Config, device: torch.device):
        if config.dataset.kind != "bouncing_shapes":
            raise UserError(
                "dataset.kind: a locator learns from bouncing_shapes, whose positions are known, not "
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
        self.normaliser = Normaliser(unstandardised(config.latents.embedding_norm), torch.float32)

    @torch.no_grad()
    def of(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        """Latents `n h w d` and centres `n 2 2` of all latent frames of a batch; of a single image where a clip is
        one."""
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


def unstandardised(embedding_norm: str) -> str:
    """Standardisation is a run's own; a locator has one, too."""
    return "none" if embedding_norm == "standardize" else embedding_norm


def train_locator(config: Config, kind: str, steps: int, device: torch.device) -> tuple[Locator, float]:
    """A locator trained on the training split, and its mean error in pixels on validation clips."""
    if kind not in LOCATORS:
        raise UserError(f"--head: {kind!r} is none of {', '.join(LOCATORS)}")
    frames = FrameLatents(config, device)
    torch.manual_seed(config.seed)
    locator = Locator(kind, frames.grid, config.dataset.shapes.image_size).to(device)
    optimizer = torch.optim.AdamW(locator.parameters(), LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    share = BatchShare(0, 1, BATCH_SIZE, BATCH_SIZE)
    batches = frames.dataset.train_batches(0, share, device)
    for step in (bar := tqdm(range(steps), "locator", disable=None)):
        latents, centres = frames.of(next(batches))
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
    errors = []
    for batch in frames.dataset.validation_batches(share, BATCH_SIZE, CHECKED_CLIPS, device):
        latents, centres = frames.of(batch)
        error = pixel_errors(locator.locate(latents), centres).view(len(batch.valid), -1)
        errors.append(error[batch.valid.to(device)].flatten())
    return locator, torch.cat(errors).mean().item()


def pixel_errors(located: Tensor, centres: Tensor) -> Tensor:
    """Distance of located from true centres `… 2 2`, the mean over the shapes: `…`."""
    return (located - centres).norm(dim=-1).mean(-1)


def identity(config: Config) -> dict:
    """What a run must share with the locator that judges it."""
    backbone = asdict(config.backbone)
    del backbone["encode"]  # joint latents are located, too; how well, the error on true ones tells
    norm = unstandardised(config.latents.embedding_norm)
    return {"backbone": backbone, "embedding_norm": norm, "image_size": config.dataset.shapes.image_size}


def save_locator(path: Path, locator: Locator, config: Config) -> None:
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
    """Raises `UserError` where the file is no locator, or one of another encoder, normalisation or canvas than the
    configuration's."""
    weights, metadata = read_tensor_file(path, FORMAT, "flperf locator", device)
    theirs, ours = json.loads(metadata["identity"]), identity(config)
    wrong = [f"{key} {theirs[key]!r} (here {value!r})" for key, value in ours.items() if theirs[key] != value]
    if wrong:
        raise UserError(f"{path}: this locator is of another encoder or canvas: {'; '.join(wrong)}")
    locator = Locator(metadata["head"], tuple(json.loads(metadata["grid"])), theirs["image_size"]).to(device)
    locator.load_state_dict(weights)
    return locator.requires_grad_(False).eval()


class PixelErrors:
    """Watches an evaluation: how far from the true centres a locator finds the shapes in forecast, copied and true
    latents."""

    def __init__(self, locator: Locator, run: Run):
        if run.config.dataset.kind != "bouncing_shapes":
            raise UserError(
                "--locator: judges bouncing_shapes, whose positions are known, not dataset.kind "
                f"{run.config.dataset.kind!r}"
            )
        self.locator, self.run = locator, run
        self.sums = MeanAccumulator(run.process.device)

    def add(self, latents: dict[str, Tensor], batch: ClipBatch) -> None:
        """latents: normalised, fp32, `b t h w d` each (t may be 1)."""
        geometry, device = self.run.geometry, self.run.process.device
        centres = frame_centres(batch.centres.to(device), self.run.encoder)
        centres = centres[:, geometry.context_frames : geometry.context_frames + geometry.target_frames]
        valid = batch.valid.to(device)
        self.sums.count(valid)
        for name, values in latents.items():
            self.sums.add(name, pixel_errors(self.locator.locate(self._raw(values)), centres), valid)

    def _raw(self, latents: Tensor) -> Tensor:
        normaliser = self.run.normaliser
        return latents * normaliser.std + normaliser.mean if normaliser.kind == "standardize" else latents

    def result(self) -> dict[str, list[float]]:
        """By name, the mean error in pixels of the canvas at every latent frame ahead; over all processes."""
        return {name: mean.tolist() for name, mean in self.sums.means().items()}


def locator_summary(errors: dict[str, list[float]]) -> str:
    names = {"forecast": "forecast", "sample": "one sample", "copy_last": "copy last", "target": "true latents"}
    shown = {label: errors[name] for name, label in names.items() if name in errors}
    rows = [f"{label:>14}" + "".join(f"{error:9.1f}" for error in ahead) for label, ahead in shown.items()]
    return "\n".join(["where the shapes are, error in pixels by latent frame ahead:", *rows])
