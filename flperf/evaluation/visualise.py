"""Pictures of forecasts: for each of a few clips a folder of tensors, short videos and one overview.

The three strongest principal components of latents are shown as red, green and blue. Context, target and forecast share
one basis, fitted on the true latents of the clip, so equal colours mean equal latents.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from flperf.errors import UserError
from flperf.models.baselines import Baselines
from flperf.objectives.build import forecast
from flperf.run import Run

COLUMNS = 16  # latent frames in the overview, at most
PREVIEW_SIZE = 128  # pixels, of the videos of projected latents
PREVIEW_RATE = 12.0  # frames per second of a video whose own rate is unknown
BASELINE_LABELS = {
    "copy_last": "copy of the last latent",
    "mean": "mean latent",
    "median": "median latent",
    "ridge": "ridge regression",
}


@dataclass(frozen=True)
class Example:
    """One clip: normalised latents `t h w d` on the CPU. The target is None if the future is unknown; the forecast may
    be longer than the target."""

    context: Tensor
    forecast: Tensor  # one sample
    target: Tensor | None = None
    video: Tensor | None = None  # uint8 `f h w c`, the encoder's input
    baselines: Baselines | None = None  # on the CPU, to draw their errors

    @property
    def true(self) -> Tensor:
        """True latents `t h w d`: the context and the target, as far as it is known and forecast."""
        return self.context if self.target is None else torch.cat([self.context, self.target[: len(self.forecast)]])


class Projection:
    """Maps latents `… d` to colours `… 3` in [0, 1] by the three strongest principal components of the latents that it
    is fitted on."""

    def __init__(self, latents: Tensor):
        tokens = latents.flatten(0, -2).double()
        self.mean = tokens.mean(0)
        values, vectors = torch.linalg.eigh(torch.atleast_2d((tokens - self.mean).T.cov(correction=0)))
        strongest = vectors[:, values.argsort(descending=True)[:3]]
        # An eigenvector's sign is arbitrary: its largest entry is made positive.
        largest = strongest.gather(0, strongest.abs().argmax(0, keepdim=True))
        self.basis = strongest * largest.sign()
        low, high = (self._project(tokens).quantile(q, dim=0) for q in (0.01, 0.99))
        self.low, self.span = low, (high - low).clamp(min=1e-6)

    def _project(self, latents: Tensor) -> Tensor:
        projected = (latents.double() - self.mean) @ self.basis
        return torch.nn.functional.pad(projected, (0, 3 - projected.shape[-1]))  # fewer than three channels

    def __call__(self, latents: Tensor) -> Tensor:
        return ((self._project(latents) - self.low) / self.span).clamp(0, 1).float()


def write_example(folder: str | Path, example: Example) -> Path:
    """Write the tensors, videos and overview of one clip to a folder; returns the path of the overview.

    The files: video.pt, video.mp4; context_latents.pt, target_latents.pt and prediction_latents.pt, `t h w d`; the same
    names with `_pca` as tensors `t h w 3` and as mp4; overview.png. Raises `UserError` if they can't be written.
    """
    folder = Path(folder)
    projection = Projection(example.true)
    latents = {"context": example.context, "target": example.target, "prediction": example.forecast}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        video = None if example.video is None else rearrange(example.video, "f h w c -> f c h w").contiguous()
        save_visualisation_tensors(video, example.context, example.target, example.forecast, folder)
        if video is not None:
            frames, rate = convert_video_tensor_to_mp4(video)
            save_mp4_video(frames, folder / "video", rate)
        for name, values in latents.items():
            if values is not None:
                _write_projection(folder / f"{name}_pca", projection(values))
        return draw_overview(folder / "overview.png", example, projection)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: the pictures of a forecast can't be written: {error.strerror}"
        ) from error


def save_visualisation_tensors(
    video: Tensor | None, context: Tensor, target: Tensor | None, prediction: Tensor, out_dir: str | Path
) -> None:
    """Save video uint8 `t c h w` and latents `t h w d` as `video.pt`, `context_latents.pt` and so on, one tensor per
    file; what is None is left out."""
    tensors = {"video": video, "context_latents": context, "target_latents": target, "prediction_latents": prediction}
    for name, tensor in tensors.items():
        if tensor is not None:
            torch.save(tensor.detach().cpu().clone(), Path(out_dir) / f"{name}.pt")


def _write_projection(base: Path, colours: Tensor) -> None:
    """Write colours `t h w 3` as a tensor and as a video in which each latent is a square."""
    torch.save(colours, base.with_suffix(".pt"))
    scale = max(1, PREVIEW_SIZE // max(colours.shape[1:3]))
    frames, _ = convert_video_tensor_to_mp4(repeat(colours, "t h w c -> t c (h p) (w q)", p=scale, q=scale))
    save_mp4_video(frames, base, PREVIEW_RATE / 2)


def draw_overview(path: Path, example: Example, projection: Projection) -> Path:
    """Draw rows of video frames, true latents and forecast latents, one column per latent frame; below them the error
    of the forecast at each latent frame ahead. Returns `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    known, ahead = len(example.context), len(example.forecast)
    total = known + ahead
    shown = (
        sorted({round(i * (total - 1) / (COLUMNS - 1)) for i in range(COLUMNS)})
        if total > COLUMNS
        else list(range(total))
    )
    rows = _picture_rows(example, projection, total)
    figure = Figure(figsize=(1.05 * len(shown) + 1.6, 1.15 * len(rows) + 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    pictures, errors = cast(Any, figure.subfigures(2, 1, height_ratios=(1.15 * len(rows) + 0.3, 2.1)))
    axes = pictures.subplots(len(rows), len(shown), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, frame in zip(row, shown, strict=True):
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(
                color="tab:blue" if frame < known else "tab:orange", linewidth=1.5, visible=frame in images
            )
            if frame in images:
                axis.imshow(images[frame])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, frame in zip(axes[0], shown, strict=True):
        axis.set_title(f"context {frame - known + 1}" if frame < known else f"+{frame - known + 1}", fontsize=8)
    _draw_errors(errors.subplots(), example)
    figure.savefig(path, dpi=90)
    return path


def _picture_rows(example: Example, projection: Projection, total: int) -> dict[str, dict[int, Tensor]]:
    """Images `h w 3` by label of the row and by latent frame."""
    known = len(example.context)
    rows = {}
    if example.video is not None:
        step = max(1, len(example.video) // len(example.true))
        rows["video"] = {frame: example.video[frame * step] for frame in range(min(total, len(example.video) // step))}
    rows["true latents"] = dict(enumerate(projection(example.true)))
    rows["forecast"] = {known + frame: image for frame, image in enumerate(projection(example.forecast))}
    return rows


def _draw_errors(axis, example: Example) -> None:
    """Draw the L1 error of the forecast and of the baselines."""
    if example.target is None:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "the true future is unknown", ha="center", va="center")
        return
    target = example.target[: len(example.forecast)]
    forecasts = {"forecast": example.forecast[: len(target)]}
    if example.baselines is not None:
        baselines = example.baselines.forecasts(example.context[None])
        forecasts |= {label: baselines[name][0] for name, label in BASELINE_LABELS.items()}
    for (label, latents), style in zip(forecasts.items(), ("o-", "s--", "^:", "d:", "v:"), strict=False):
        error = (latents[: len(target)] - target).abs().mean((1, 2, 3))
        axis.plot(range(1, len(target) + 1), error, style, label=label, markersize=4)
    axis.set(xlabel="latent frames ahead", ylabel="L1 error\n(normalised)", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


@torch.no_grad()
def dump_examples(run: Run, folder: Path) -> list[Path]:
    """Write `evaluation.dump_examples` clips of the split "visualisation", or else of "validation", to
    `folder/example_00` and so on.

    Returns the paths of their overviews. In flow matching the first sample is shown, not the mean of the samples.
    """
    split = "visualisation" if "visualisation" in run.dataset.splits else "validation"
    count = min(run.config.evaluation.dump_examples, len(run.dataset.splits[split]))
    baselines = run.baselines.to(torch.device("cpu"))
    pictures = []
    for batch in run.dataset.chosen_batches([range(count)], run.share.micro_batch_size, split, run.process.device):
        context, target = run.latents(batch)
        samples = forecast(run.objective, run.forecaster, context, batch.sample.to(run.process.device))[:, 0]
        for clip in batch.valid.nonzero()[:, 0].tolist():
            known, ahead, truth = (part[clip].float().cpu() for part in (context, samples, target))
            video = None if batch.video is None else batch.video[clip].cpu()
            pictures.append(
                write_example(folder / f"example_{len(pictures):02d}", Example(known, ahead, truth, video, baselines))
            )
    return pictures


def convert_video_tensor_to_mp4(video_tensor: Tensor) -> tuple[np.ndarray, float]:
    """Convert video `t c h w`, uint8 or float in [0, 1], to frames uint8 `t h w c` and a frame rate for
    `save_mp4_video`.

    The last row or column is repeated where the height or width is odd, since H.264 halves the resolution of colours.
    Raises `ValueError` for another shape.
    """
    if video_tensor.ndim != 4 or video_tensor.shape[1] not in (1, 3):
        raise ValueError(f"video: expected t c h w with 1 or 3 channels, got {list(video_tensor.shape)}")
    video = video_tensor.detach().cpu()
    if video.is_floating_point():
        video = (video.clamp(0, 1) * 255).round()
    height, width = video.shape[-2:]
    padded = F.pad(video.float(), (0, width % 2, 0, height % 2), mode="replicate")
    frames = rearrange(padded.expand(-1, 3, -1, -1), "t c h w -> t h w c").byte()
    return frames.numpy(), PREVIEW_RATE


def save_mp4_video(frames: np.ndarray, out_base_path: str | Path, fps: float) -> Path:
    """Write frames uint8 `t h w c` of even height and width as H.264 to `<out_base_path>.mp4`; returns that path."""
    path = Path(f"{out_base_path}.mp4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "17", "preset": "veryfast"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path
