"""Bouncing shapes: a square that bounces off the walls and a disk on a circle, drawn rather than read.

A clip is a pure function of (seed, index): its motion is computed in closed form for every frame at once, and the pixels of a whole
batch are compared with the shapes in a few tensor operations on the training device. Lengths are in pixels of a canvas of
`image_size`, drawn at whatever resolution the backbone takes.
"""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from flperf.config import Shapes, UserError
from flperf.data.clips import Batches, ClipBatch, Draw
from flperf.data.preprocessing import Size

SQUARE_COLOUR = (230, 60, 50)
DISK_COLOUR = (60, 110, 235)
BACKGROUND = (16, 16, 16)
SPLICED = 2**32  # added to the seed of what is spliced in


def read_batches(
    batches: Iterable[list[Draw]],
    labels: list[int],
    first_index: int,
    shapes: Shapes,
    seed: int,
    n_frames: int,
    stride: int,
    size: Size,
    device: torch.device,
) -> Batches:
    """Yield batches drawn on `device`; clip i of the split has index `first_index + i`."""
    for draws in batches:
        indices = [first_index + draw.clip for draw in draws]
        video, _ = draw_clips(indices, shapes, seed, n_frames, stride, size, device)
        yield ClipBatch.of(draws, labels, video=video)


def draw_clips(
    indices: list[int], shapes: Shapes, seed: int, n_frames: int, stride: int, size: Size, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The clips of some indices: video uint8 `b f h w c`, and centres `b f 2 2` of square and disk as (x, y) on the canvas."""
    centres = torch.stack([torch.from_numpy(_centres(index, shapes, seed, n_frames, stride)) for index in indices])
    if shapes.splice_at is not None:
        others = [torch.from_numpy(_centres(index, shapes, seed + SPLICED, n_frames, stride)) for index in indices]
        centres[:, shapes.splice_at :] = torch.stack(others)[:, shapes.splice_at :]
    return draw_shapes(centres.to(device), shapes, size), centres


def draw_shapes(centres: Tensor, shapes: Shapes, size: Size) -> Tensor:
    """Pixels uint8 `b f h w c` of shapes at centres `b f 2 2`; the disk lies over the square."""
    height, width = size
    y = (torch.arange(height, device=centres.device) + 0.5) * (shapes.image_size / height)
    x = (torch.arange(width, device=centres.device) + 0.5) * (shapes.image_size / width)
    dx = x - centres[..., 0, None]  # b f object w
    dy = y - centres[..., 1, None]  # b f object h
    in_columns, in_rows = (offset[:, :, 0].abs() <= shapes.square_size / 2 for offset in (dx, dy))
    square = in_rows[..., :, None] & in_columns[..., None, :]  # b f h w
    disk = dy[:, :, 1, :, None] ** 2 + dx[:, :, 1, None, :] ** 2 <= shapes.disk_radius**2
    which = torch.where(disk, 2, square.long())
    palette = torch.tensor([BACKGROUND, SQUARE_COLOUR, DISK_COLOUR], dtype=torch.uint8, device=centres.device)
    return palette[which]


def bounce(start: np.ndarray, velocity: np.ndarray, time: np.ndarray, low: float, high: float | np.ndarray) -> np.ndarray:
    """Position `f 2` at times `f` of a point that is reflected between `low` and `high` (for each axis, or for both)."""
    travelled = np.mod(start - low + velocity * time[:, None], 2 * (high - low))
    return low + np.minimum(travelled, 2 * (high - low) - travelled)


def circle(centre: float, radius: float, phase: float, period: float, time: np.ndarray) -> np.ndarray:
    """Position `f 2` at times `f` on a circle; a negative period runs backwards."""
    angle = phase + 2 * math.pi * time / period
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def check(shapes: Shapes) -> None:
    half, size = shapes.square_size / 2, shapes.image_size
    if shapes.square_size >= size or 4 * shapes.disk_radius >= size:
        raise UserError(f"dataset.shapes: the square ({shapes.square_size}) or disk ({shapes.disk_radius}) is too large for {size} pixels")
    if shapes.square_init is not None and not all(half <= x <= size - half for x in shapes.square_init):
        raise UserError(f"dataset.shapes.square_init: {shapes.square_init} puts the square beyond the walls of {size} pixels")


def _centres(index: int, shapes: Shapes, seed: int, n_frames: int, stride: int) -> np.ndarray:
    """Centres `f 2 2` of one clip. What the configuration leaves open is drawn, always in the same order."""
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
