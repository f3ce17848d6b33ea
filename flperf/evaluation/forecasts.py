"""Writes forecasts of validation clips: one safetensors file with all samples, and a folder of pictures per clip.

This is the work of `flperf sample`. It is apart from the command's parser so that mistakes in the arguments are
reported before torch is loaded.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flperf.data.unreadable import BadClip
from flperf.errors import UserError
from flperf.evaluation.visualise import Example, write_example
from flperf.files import atomic_file
from flperf.objectives.build import forecast
from flperf.run import Run


def frames_for(seconds: float, stride: int, frames_per_latent: int, rate: float) -> int:
    """The number of latent frames that covers `seconds` after the last context frame."""
    return math.ceil(seconds * rate / (frames_per_latent * stride) - 1e-9)


def seconds_ahead(frames: int, stride: int, frames_per_latent: int, rate: float) -> list[float]:
    """The time of the last video frame of each forecast latent frame, in seconds after the last context frame."""
    return [(frame + 1) * frames_per_latent * stride / rate for frame in range(frames)]


@torch.no_grad()
def write_forecasts(run: Run, out: Path, clips: int, frames: int | None, seconds: float | None) -> str:
    """Forecast the first `clips` validation clips; returns a line that describes what was written.

    forecasts.safetensors holds forecast `n k t h w d`, context and target `n t h w d` (all normalised), clip int64 [n]
    (rows of the validation split) and, if the frame rates of the files are known, seconds [n t]. Raises `UserError` if
    there are no validation clips, or if `seconds` is given and the frame rates are unknown.
    """
    clips = min(clips, run.dataset.validation_size)
    if not clips:
        raise UserError("dataset.validation: is not set; forecasts are made of validation clips")
    rates = clip_rates(run, clips)
    if seconds is not None:
        if rates is None:
            kind = run.config.dataset.kind
            raise UserError(f"--seconds: clips of dataset.kind {kind!r} have no frame rate; use --frames")
        frames = frames_for(seconds, run.config.dataset.stride, run.encoder.frames_per_latent, max(rates))
    tensors, videos = _forecasts(run, clips, frames)
    if rates is not None:
        pace = (tensors["forecast"].shape[2], run.config.dataset.stride, run.encoder.frames_per_latent)
        tensors["seconds"] = torch.tensor([seconds_ahead(*pace, rates[clip]) for clip in tensors["clip"].tolist()])
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(out / "forecasts.safetensors") as unfinished:
        save_file(tensors, unfinished)
    baselines = run.baselines.to(torch.device("cpu"))
    for row, clip in enumerate(tensors["clip"].tolist()):
        context, samples, target = (tensors[name][row].float() for name in ("context", "forecast", "target"))
        write_example(out / f"clip_{clip:05d}", Example(context, samples[0], target, videos[clip], baselines))
    count, k, ahead = tensors["forecast"].shape[:3]
    return f"{out / 'forecasts.safetensors'}: {count} clips, {k} samples each, {ahead} latent frames ahead"


def _forecasts(run: Run, clips: int, frames: int | None) -> tuple[dict[str, Tensor], dict[int, Tensor | None]]:
    """Tensors of the readable clips by name, and their videos by row of the validation split, all on the CPU."""
    parts, videos = [], {}
    for batch in run.dataset.chosen_batches(
        [range(clips)], run.share.micro_batch_size, "validation", run.process.device
    ):
        context, target = run.latents(batch)
        samples = forecast(run.objective, run.forecaster, context, batch.sample.to(run.process.device), frames)
        kept = {"forecast": samples.to(run.dtype), "context": context, "target": target, "clip": batch.clip}
        parts.append({name: tensor[batch.valid].cpu() for name, tensor in kept.items()})
        for index in batch.valid.nonzero()[:, 0].tolist():
            videos[int(batch.clip[index])] = None if batch.video is None else batch.video[index].cpu()
    return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}, videos


def clip_rates(run: Run, clips: int) -> list[float] | None:
    """Frames per second of the first validation clips, 0 for an unreadable file; None if clips are not video files."""
    if run.dataset.frame_rate is None:
        return None
    rates = []
    for path in run.dataset.splits["validation"].paths[:clips]:
        try:
            rates.append(run.dataset.frame_rate(path))
        except BadClip:  # reported where it is decoded
            rates.append(0.0)
    return rates
