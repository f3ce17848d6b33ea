"""Reads a trained head from a run, a checkpoint or an exported file, and forecasts with it in Python.

An export is one safetensors file with the head's weights (`head.*`) and the statistics of its latents (`statistics.*`).
Its metadata contains the resolved configuration and the step. The encoder is not part of it: the configuration names
the encoder's weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from flperf.config import Config, parse_config
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import frames_shown
from flperf.engine.checkpoint_files import latest_checkpoint, read_weights
from flperf.engine.engine import load_weights
from flperf.engine.process import compute_dtype
from flperf.errors import UserError
from flperf.files import atomic_file, read_tensor_file
from flperf.models.baselines import Baselines, load_statistics, split_statistics
from flperf.models.encoder import build_encoder
from flperf.models.heads import build_head
from flperf.models.latents import LatentGeometry, Normaliser, Statistics
from flperf.objectives.build import build_objective, forecast

FORMAT = "flperf forecaster 1"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trained:
    """The result of training: fp32 weights by parameter name, statistics, and the configuration as YAML text."""

    source: str
    config: str
    step: int
    weights: dict[str, Tensor]
    statistics: Statistics
    baselines: Baselines

    def resolved(self, overrides: Sequence[str] = ()) -> Config:
        """The configuration of the training, with `section.key=value` overrides."""
        return parse_config(self.config, f"{self.source}: config.yaml", overrides)

    def geometry(self, config: Config) -> LatentGeometry:
        """The geometry of the head's forecasts."""
        frames, height, width, dim = self.baselines.position_mean.shape
        return LatentGeometry(config.model.num_context_latents, frames, height, width, dim)


def read_trained(path: str | Path, *, average: bool = True) -> Trained:
    """Read an exported file, the newest checkpoint in a run's folder, or the folder of one checkpoint. average: read
    the averaged weights, if the run keeps any.

    Raises `UserError` that names what is missing.
    """
    path = Path(path)
    if path.is_file():
        return _read_export(path)
    checkpoint = path if path.name.startswith("step_") else latest_checkpoint(path / "checkpoints")
    if checkpoint is None or not checkpoint.is_dir():
        raise UserError(f"{path}: is neither an exported file nor a run's folder with a checkpoint")
    run = checkpoint.parent.parent
    for name in ("config.yaml", "latent_statistics.safetensors"):
        if not (run / name).is_file():
            raise UserError(f"{checkpoint}: belongs to a run, but {run / name} is missing")
    config = (run / "config.yaml").read_text()
    average = average and parse_config(config, str(run / "config.yaml")).trainer.ema_decay is not None
    statistics, baselines = load_statistics(run / "latent_statistics.safetensors", CPU)
    step = int(checkpoint.name.removeprefix("step_"))
    return Trained(str(checkpoint), config, step, read_weights(checkpoint, average), statistics, baselines)


def write_export(trained: Trained, path: str | Path) -> None:
    """Write one safetensors file. It replaces a file of this name when it is complete."""
    path = Path(path)
    statistics = {**vars(trained.statistics), **vars(trained.baselines)}
    tensors = {f"head.{name}": tensor for name, tensor in trained.weights.items()}
    tensors |= {f"statistics.{name}": tensor for name, tensor in statistics.items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as unfinished:
        save_file(tensors, unfinished, metadata={"format": FORMAT, "config": trained.config, "step": str(trained.step)})


def _read_export(path: Path) -> Trained:
    tensors, metadata = read_tensor_file(path, FORMAT, "flperf export", CPU)
    weights = {name.removeprefix("head."): tensor for name, tensor in tensors.items() if name.startswith("head.")}
    measured = {
        name.removeprefix("statistics."): tensor for name, tensor in tensors.items() if name.startswith("statistics.")
    }
    return Trained(str(path), metadata["config"], int(metadata["step"]), weights, *split_statistics(measured))


class Forecaster:
    """The frozen encoder and a trained head, for videos in memory.

        forecaster = load_forecaster("forecaster.safetensors")
        latents = forecaster.forecast(video)  # video: uint8 f h w c, any size

    A head trained with `dataset.fps` also needs the video's frame rate: `forecaster.forecast(video, frame_rate=30)`.
    `context_frames` is the number of video frames that it uses; `config`, `geometry` and `statistics` are those of the
    training.
    """

    def __init__(self, trained: Trained, device: torch.device, overrides: list[str], compile: bool):
        self.config = config = trained.resolved(overrides)
        self.device, self.geometry, self.statistics = device, trained.geometry(config), trained.statistics
        dtype = compute_dtype(config.engine.precision, device)
        self.preprocessing = Preprocessing.of(config.backbone)
        self.encoder = build_encoder(config.backbone, self.preprocessing, dtype=dtype, device=device, compile=compile)
        self.head = (
            build_head(config.model, self.geometry, seed=config.seed, compile=compile)
            .to(device)
            .requires_grad_(False)
            .eval()
        )
        load_weights(self.head, trained.weights, dtype)
        self.normaliser = Normaliser(config.latents.embedding_norm, dtype, trained.statistics).to(device)
        self.objective = build_objective(config, self.geometry)
        self.context_frames = self.geometry.context_frames * self.encoder.frames_per_latent

    @torch.no_grad()
    def context(self, video: Tensor, frame_rate: float | None = None) -> Tensor:
        """Normalised latents `1 t h w d` of the last `context_frames` frames of a video, uint8 `f h w c`, at the stride
        or the `dataset.fps` of the training.

        frame_rate: frames a second of the video, needed if `dataset.fps` is set and of no effect otherwise. Raises
        `ValueError` for a video of another dtype or shape, for a shorter one, and if the frame rate is missing.
        """
        indices = self._context_indices(len(video), frame_rate)
        if video.dtype != torch.uint8 or video.ndim != 4 or video.shape[-1] != 3 or indices[0] < 0:
            needed = len(video) - int(indices[0])
            raise ValueError(
                f"video: needs uint8 f h w c of at least {needed} frames, got {video.dtype} {list(video.shape)}"
            )
        pixels = self.preprocessing.apply(video[indices])[None].contiguous().to(self.device)
        return self.normaliser(self.encoder(pixels))

    def _context_indices(self, length: int, frame_rate: float | None) -> Tensor:
        """Indices int64 [f] of the context in a video of `length` frames, whose last frame is the last one; negative
        where the video is too short."""
        fps, back = self.config.dataset.fps, np.arange(1 - self.context_frames, 1)
        if fps is None:
            return torch.from_numpy(length - 1 + back * self.config.dataset.stride)
        if frame_rate is None or not 0 < frame_rate < math.inf:
            raise ValueError(
                f"frame_rate: is {frame_rate}; needs the video's frames a second, since dataset.fps is {fps:g} here"
            )
        span = math.ceil((self.context_frames - 1) * frame_rate / fps) + 1
        times = np.arange(-span, 1) / frame_rate  # of frames up to the last one, at 0
        return torch.from_numpy(length - 1 - span + frames_shown(times, back / fps, fps))

    @torch.no_grad()
    def forecast(
        self, video: Tensor, frames: int | None = None, seed: int = 0, frame_rate: float | None = None
    ) -> Tensor:
        """fp32 `k t h w d`: samples (one in regression) of the normalised latents that follow a video, uint8 `f h w c`.

        frames: number of latent frames (default: as in training; more are rolled out). frame_rate: as for `context`.
        Raises `ValueError` as `context` does.
        """
        sample = torch.tensor([seed], device=self.device)
        return forecast(self.objective, self.head, self.context(video, frame_rate), sample, frames)[0]


def load_forecaster(
    path: str | Path, *, device: str | torch.device | None = None, overrides: Sequence[str] = (), compile: bool = False
) -> Forecaster:
    """The forecaster of a run, a checkpoint or an export. overrides: for example
    `["backbone.weights=/data/vjepa2"]`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Forecaster(read_trained(path), device, list(overrides), compile)
