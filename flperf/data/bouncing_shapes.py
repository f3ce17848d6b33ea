"""A dataset of bouncing shapes: a square that bounces off the walls and a disk on a circle, drawn instead of read.

A clip is a pure function of (seed, index): its motion is computed in closed form for all frames at once. Lengths are in
pixels of a canvas of `image_size`, drawn at the resolution that the backbone takes.

Positions are (x, y) in pixels of the canvas; the upper left corner of the first pixel is (0, 0). In [-1, 1] that corner
is (-1, -1) and the opposite one (1, 1).
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flperf.config import Config, Shapes
from flperf.data.annotations import Annotations
from flperf.data.canvas import Canvas
from flperf.data.dataset import Dataset
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import Batches, ClipBatch, ClipRequest, Sampler
from flperf.errors import UserError

SHAPES = ("square", "disk")  # the order of centres and heatmaps
SPLICED = 2**32  # added to the seed of the clip that is spliced in


def open_shapes(config: Config, preprocessing: Preprocessing, seed: int) -> Dataset:
    """The splits "train", "validation" and "visualisation", whose clips have consecutive indices."""
    dataset, shapes = config.dataset, config.dataset.shapes
    check(shapes)
    first, splits, first_indices = 0, {}, {}
    for split in ("train", "validation", "visualisation"):
        size = getattr(shapes, f"{split}_clips")
        kept = min(size, dataset.limit or size)
        splits[split] = Annotations([f"bouncing_shapes/{split}/{i}" for i in range(kept)], [0] * kept)
        first_indices[split] = first
        first += size  # so that a limit changes no clip

    def load(requests: Iterator[list[ClipRequest]], sampler: Sampler, split: str, device: torch.device) -> Batches:
        canvas = Canvas(dataset.n_frames, preprocessing.size, device)
        for batch in requests:
            indices = [first_indices[split] + request.clip for request in batch]
            centres = clip_centres(indices, shapes, seed, dataset.n_frames, dataset.stride)
            video, on_release = canvas.draw(centres, shapes)
            content = {"video": video, "centres": torch.from_numpy(centres), "on_release": on_release}
            yield ClipBatch.of(batch, splits[split].labels, **content)

    return Dataset(splits, load, seed)


def clip_centres(indices: list[int], shapes: Shapes, seed: int, n_frames: int, stride: int) -> np.ndarray:
    """Centres fp32 `b f 2 2`, as (x, y) of square and disk, of the clips with these indices."""
    centres = np.stack([_centres(index, shapes, seed, n_frames, stride) for index in indices])
    if shapes.splice_at is not None:
        others = np.stack([_centres(index, shapes, seed + SPLICED, n_frames, stride) for index in indices])
        centres[:, shapes.splice_at :] = others[:, shapes.splice_at :]
    return centres


def to_unit(pixels: Tensor, image_size: int) -> Tensor:
    """Positions `…` in pixels of the canvas to [-1, 1]."""
    return pixels * (2 / image_size) - 1


def to_pixels(unit: Tensor, image_size: int) -> Tensor:
    """Positions `…` in [-1, 1] to pixels of the canvas."""
    return (unit + 1) * (image_size / 2)


def patch_heatmaps(centres: Tensor, image_size: int, height: int, width: int) -> Tensor:
    """Distributions over `height` x `width` patches, `… h w`, whose means are the centres `… 2` in pixels of the
    canvas.

    The weights of the patches around a centre are bilinear. A centre beyond the outermost patches' centres is clamped
    to them.
    """
    axes = []
    for axis, count in ((1, height), (0, width)):
        # in patches, from the centre of the first one
        position = (centres[..., axis] * (count / image_size) - 0.5).clamp(0, count - 1)
        low = position.floor().long().clamp(max=max(count - 2, 0))
        share = (position - low)[..., None]
        high = (low + 1).clamp(max=count - 1)
        axes.append((1 - share) * F.one_hot(low, count) + share * F.one_hot(high, count))
    rows, columns = axes
    return rows[..., :, None] * columns[..., None, :]


def heatmap_centres(heatmaps: Tensor, image_size: int) -> Tensor:
    """The mean position `… 2`, in pixels of the canvas, of distributions over patches `… h w`: the inverse of
    `patch_heatmaps`."""
    height, width = heatmaps.shape[-2:]
    y, x = ((torch.arange(count, device=heatmaps.device) + 0.5) * (image_size / count) for count in (height, width))
    return torch.stack([(heatmaps.sum(-2) * x).sum(-1), (heatmaps.sum(-1) * y).sum(-1)], dim=-1)


def bounce(
    start: np.ndarray, velocity: np.ndarray, time: np.ndarray, low: float, high: float | np.ndarray
) -> np.ndarray:
    """Positions `f 2` at times `f` of a point that is reflected at `low` and `high`, of each axis or of both."""
    travelled = np.mod(start - low + velocity * time[:, None], 2 * (high - low))
    return low + np.minimum(travelled, 2 * (high - low) - travelled)


def circle(centre: float, radius: float, phase: float, period: float, time: np.ndarray) -> np.ndarray:
    """Positions `f 2` at times `f` on a circle; a negative period reverses the direction."""
    angle = phase + 2 * math.pi * time / period
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def check(shapes: Shapes) -> None:
    """Raise `UserError` if the shapes do not fit the canvas."""
    half, size = shapes.square_size / 2, shapes.image_size
    if shapes.square_size >= size or 4 * shapes.disk_radius >= size:
        raise UserError(
            f"dataset.shapes: the square ({shapes.square_size}) or disk ({shapes.disk_radius}) is too large for "
            f"{size} pixels"
        )
    if shapes.square_init is not None and not all(half <= x <= size - half for x in shapes.square_init):
        raise UserError(
            f"dataset.shapes.square_init: {shapes.square_init} puts the square beyond the walls of {size} pixels"
        )


def _centres(index: int, shapes: Shapes, seed: int, n_frames: int, stride: int) -> np.ndarray:
    """Centres fp32 `f 2 2` of one clip. All random numbers are drawn, always in the same order; configured values
    replace them."""
    random = np.random.default_rng((seed, index))
    low, high = shapes.square_size / 2, shapes.image_size - shapes.square_size / 2
    start = random.uniform(low, high, 2)
    speed, heading = shapes.image_size * random.uniform(0.005, 0.02), random.uniform(0, 2 * math.pi)
    velocity = speed * np.array([math.cos(heading), math.sin(heading)])
    phase, period = random.uniform(0, 2 * math.pi), random.uniform(48, 128) * random.choice([-1, 1])
    radius = random.uniform(shapes.image_size / 8, shapes.image_size / 2 - shapes.disk_radius)
    if shapes.square_init is not None:
        start = np.array(shapes.square_init)
    if shapes.square_vel is not None:
        velocity = np.array(shapes.square_vel)
    time = np.arange(n_frames) * float(stride)
    square = bounce(start, velocity, time, low, high)
    disk = circle(shapes.image_size / 2, radius, phase, period, time)
    return np.stack([square, disk], axis=1).astype(np.float32)
