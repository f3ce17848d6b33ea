"""Bouncing shapes: a square that bounces off the walls and a disk on a circle, drawn rather than read.

A clip is a pure function of (seed, index): its motion is computed in closed form for every frame at once. A square is
a box of pixels, a disk a run of them in each of its rows, computed where they are drawn. A GPU compares every pixel
with them. A CPU writes all boxes, or runs, of one extent by one call; where a batch's memory is used again only the
boxes around the shapes drawn last are painted over, so most of a frame is never touched. Lengths are in pixels of a
canvas of `image_size`, drawn at whatever resolution the backbone takes.

Positions have one convention: (x, y) in pixels of the canvas, the upper left corner of the first pixel at (0, 0); in
[-1, 1] that corner is (-1, -1) and the opposite one (1, 1).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flperf.config import Shapes
from flperf.data.prefetch import Buffers
from flperf.data.preprocessing import Size
from flperf.data.samplers import Batches, ClipBatch, ClipRequest
from flperf.errors import UserError

SQUARE_COLOUR = (230, 60, 50)
DISK_COLOUR = (60, 110, 235)
BACKGROUND = (16, 16, 16)
SHAPES = ("square", "disk")  # the order of centres and heatmaps
SPLICED = 2**32  # added to the seed of what is spliced in


# of a shape in each frame, int64 `n 2` each as (y, x): its first pixel, and the one after its last
Box = tuple[Tensor, Tensor]
# of a disk in each frame, int64 `n r` each: row (the height where there is none), first pixel, end
Rows = tuple[Tensor, Tensor, Tensor]
# by (rows, pixels a row), the first pixels in a batch of the blocks of that extent, int64 [n]
Blocks = dict[tuple[int, int], np.ndarray]


class Canvas:
    """Batches of frames, uint8 `b f h w c` on `device`; on a CPU in memory that is used again once nobody holds it."""

    def __init__(self, frames: int, size: Size, device: torch.device):
        self.size, self.device = size, device
        self.buffers = Buffers((frames, *size, 3), torch.uint8, device)
        self.drawn: dict[int, list[Blocks]] = {}  # by a buffer's address, where something is on it
        self.whole_frames = torch.compile(whole_frames) if device.type == "cuda" else whole_frames

    def draw(self, centres: np.ndarray, shapes: Shapes) -> Tensor:
        """Shapes at centres `b f 2 2` on a background; the disk lies over the square."""
        *boxes, rows = extents(self._on_device(centres).flatten(0, 1), shapes, self.size)
        if self.device.type == "cpu":
            return self._draw_blocks(
                len(centres), [boxes_by_extent(box, self.size) for box in boxes], runs_by_length(rows, self.size)
            )
        return self.whole_frames(boxes[0], rows, self.size).unflatten(0, centres.shape[:2])

    def _on_device(self, centres: np.ndarray) -> Tensor:
        """From pinned memory, since a copy from elsewhere would wait for the device."""
        host = torch.from_numpy(centres)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def _draw_blocks(self, b: int, boxes: list[Blocks], disk: Blocks) -> Tensor:
        video = self.buffers.take(b)
        pixels = video.view(-1).numpy()
        if video.data_ptr() not in self.drawn:
            pixels.reshape(-1, 3)[:] = BACKGROUND
        for old in self.drawn.get(video.data_ptr(), ()):
            paint(pixels, self.size, old, BACKGROUND)
        paint(pixels, self.size, boxes[0], SQUARE_COLOUR)
        paint(pixels, self.size, disk, DISK_COLOUR)
        self.drawn[video.data_ptr()] = boxes
        return video


def extents(centres: Tensor, shapes: Shapes, size: Size) -> tuple[Box, Box, Rows]:
    """The boxes of square and disk at centres `n 2 2`, and the disk's rows. In fp64: the same pixels on every
    device."""
    square, disk = centres.double().unbind(1)
    scale = [length / shapes.image_size for length in size]
    boxes = _box(square, shapes.square_size / 2, scale, size), _box(disk, shapes.disk_radius, scale, size)
    return *boxes, _disk_rows(disk, shapes.disk_radius, scale, size)


def _box(centres: Tensor, half: float, scale: list[float], size: Size) -> Box:
    """The pixels whose centres lie within `half`, in x and in y, of centres `n 2` as (x, y)."""
    axes = list(zip(centres.flip(1).unbind(1), scale, size, strict=True))
    first = torch.stack([torch.ceil((centre - half) * factor - 0.5).clamp(min=0) for centre, factor, _ in axes], dim=1)
    end = torch.stack(
        [(torch.floor((centre + half) * factor - 0.5) + 1).clamp(max=length) for centre, factor, length in axes], dim=1
    )
    return first.long(), end.long()


def _disk_rows(centres: Tensor, radius: float, scale: list[float], size: Size) -> Rows:
    """The pixels whose centres are no further than `radius` from centres `n 2`."""
    (height, width), (down, across) = size, scale
    x, y = centres[:, :, None].unbind(1)  # n 1
    # n r
    row = torch.ceil((y - radius) * down - 0.5) + torch.arange(math.floor(2 * radius * down) + 1, device=centres.device)
    rest = radius**2 - ((row + 0.5) / down - y).square()
    reach = rest.clamp(min=0).sqrt()
    left = torch.ceil((x - reach) * across - 0.5).clamp(min=0)
    right = torch.floor((x + reach) * across - 0.5).clamp(max=width - 1) + 1
    seen = (rest >= 0) & (row >= 0) & (row < height) & (right > left)
    return torch.where(seen, row, height).long(), left.long(), right.long()


def whole_frames(square: Box, disk: Rows, size: Size) -> Tensor:
    """Square and disk drawn pixel by pixel, uint8 `n h w c` on their device."""
    device = disk[0].device
    y, x = (torch.arange(length, device=device) for length in size)
    first, end = (corner[:, :, None] for corner in square)  # n 2 1
    # n h w
    in_square = ((y >= first[:, 0]) & (y < end[:, 0]))[:, :, None] & ((x >= first[:, 1]) & (x < end[:, 1]))[:, None]
    row, *ends = disk
    left, right = (
        torch.zeros(len(row), size[0] + 1, dtype=torch.int64, device=device).scatter_(1, row, end)[:, :-1, None]
        for end in ends
    )
    background, red, blue = (
        torch.tensor(colour, dtype=torch.uint8, device=device) for colour in (BACKGROUND, SQUARE_COLOUR, DISK_COLOUR)
    )
    return torch.where(((x >= left) & (x < right))[..., None], blue, torch.where(in_square[..., None], red, background))


def boxes_by_extent(box: Box, size: Size) -> Blocks:
    """The boxes of all frames, which follow each other in memory."""
    (top, left), extent = box[0].T, box[1] - box[0]
    first = ((torch.arange(len(top)) * size[0] + top) * size[1] + left).tolist()
    blocks: dict[tuple[int, int], list[int]] = {}
    for place, (rows, length) in zip(first, extent.tolist(), strict=True):
        if rows > 0 and length > 0:
            blocks.setdefault((rows, length), []).append(place)
    return {extent: np.array(places) for extent, places in blocks.items()}


def runs_by_length(rows: Rows, size: Size) -> Blocks:
    """The rows of all frames as blocks of one row."""
    height, width = size
    row, left, right = (part.numpy() for part in rows)
    seen = row < height
    first = ((np.arange(len(row))[:, None] * height + row) * width + left)[seen]
    length = (right - left)[seen].astype(np.uint16)  # numpy sorts these by radix
    first = first[np.argsort(length, kind="stable")]
    counts = np.bincount(length)
    ends = counts.cumsum()
    return {(1, n): first[ends[n] - counts[n] : ends[n]] for n in counts.nonzero()[0].tolist()}


def paint(pixels: np.ndarray, size: Size, blocks: Blocks, colour: tuple[int, int, int]) -> None:
    """Write blocks into a batch's pixels, uint8 [3 pixels]: one call an extent, which copies each row of a block as
    one item."""
    for (rows, length), first in blocks.items():
        item = np.dtype((np.void, 3 * length))
        starts = len(pixels) // 3 - (rows - 1) * size[1] - length + 1
        # from each pixel on, and from those below it
        windows = np.ndarray((starts, rows), item, pixels, strides=(3, 3 * size[1]))
        windows[first] = np.frombuffer(bytes(colour) * length, item)


@dataclass
class ShapesBatch(ClipBatch):
    """Drawn clips with where their shapes are: `centres`, and the same as heatmaps."""

    image_size: int = 0  # of the canvas whose pixels the centres count

    def heatmaps(self, height: int, width: int) -> Tensor:
        """fp32 `b f 2 h w`: for each shape of each frame the distribution over patches that `patch_heatmaps` tells
        of."""
        return patch_heatmaps(self.centres, self.image_size, height, width)


def read_batches(
    batches: Iterable[list[ClipRequest]],
    labels: list[int],
    first_index: int,
    shapes: Shapes,
    seed: int,
    n_frames: int,
    stride: int,
    size: Size,
    device: torch.device,
) -> Batches:
    """Yield `ShapesBatch`es for `device`; clip i of the split has index `first_index + i`."""
    canvas = Canvas(n_frames, size, device)
    for draws in batches:
        centres = clip_centres([first_index + draw.clip for draw in draws], shapes, seed, n_frames, stride)
        video = canvas.draw(centres, shapes)
        yield ShapesBatch.of(
            draws, labels, video=video, centres=torch.from_numpy(centres), image_size=shapes.image_size
        )


def draw_clips(
    indices: list[int], shapes: Shapes, seed: int, n_frames: int, stride: int, size: Size
) -> tuple[Tensor, Tensor]:
    """The clips of some indices: video uint8 `b f h w c`, and centres fp32 `b f 2 2` of square and disk as (x, y) on
    the canvas."""
    centres = clip_centres(indices, shapes, seed, n_frames, stride)
    return Canvas(n_frames, size, torch.device("cpu")).draw(centres, shapes), torch.from_numpy(centres)


def clip_centres(indices: list[int], shapes: Shapes, seed: int, n_frames: int, stride: int) -> np.ndarray:
    """Centres fp32 `b f 2 2` of the clips of some indices."""
    centres = np.stack([_centres(index, shapes, seed, n_frames, stride) for index in indices])
    if shapes.splice_at is not None:
        others = np.stack([_centres(index, shapes, seed + SPLICED, n_frames, stride) for index in indices])
        centres[:, shapes.splice_at :] = others[:, shapes.splice_at :]
    return centres


def to_unit(pixels: Tensor, image_size: int) -> Tensor:
    """Pixels of the canvas to [-1, 1]."""
    return pixels * (2 / image_size) - 1


def to_pixels(unit: Tensor, image_size: int) -> Tensor:
    return (unit + 1) * (image_size / 2)


def patch_heatmaps(centres: Tensor, image_size: int, height: int, width: int) -> Tensor:
    """For centres `… 2` in pixels of the canvas the distribution over `height` x `width` patches `… h w` whose mean
    is that centre.

    The patches around a centre share it bilinearly; beyond the outermost patches' centres it is moved onto them.
    """
    axes = []
    for axis, count in ((1, height), (0, width)):
        # in patches, from the first one's centre
        place = (centres[..., axis] * (count / image_size) - 0.5).clamp(0, count - 1)
        low = place.floor().long().clamp(max=max(count - 2, 0))
        share = (place - low)[..., None]
        high = (low + 1).clamp(max=count - 1)
        axes.append((1 - share) * F.one_hot(low, count) + share * F.one_hot(high, count))
    rows, columns = axes
    return rows[..., :, None] * columns[..., None, :]


def heatmap_centres(heatmaps: Tensor, image_size: int) -> Tensor:
    """The mean position `… 2` in pixels of the canvas of distributions over patches `… h w`; what `patch_heatmaps` is
    undone by."""
    height, width = heatmaps.shape[-2:]
    y, x = ((torch.arange(count, device=heatmaps.device) + 0.5) * (image_size / count) for count in (height, width))
    return torch.stack([(heatmaps.sum(-2) * x).sum(-1), (heatmaps.sum(-1) * y).sum(-1)], dim=-1)


def bounce(
    start: np.ndarray, velocity: np.ndarray, time: np.ndarray, low: float, high: float | np.ndarray
) -> np.ndarray:
    """Position `f 2` at times `f` of a point that is reflected between `low` and `high` (for each axis, or for
    both)."""
    travelled = np.mod(start - low + velocity * time[:, None], 2 * (high - low))
    return low + np.minimum(travelled, 2 * (high - low) - travelled)


def circle(centre: float, radius: float, phase: float, period: float, time: np.ndarray) -> np.ndarray:
    """Position `f 2` at times `f` on a circle; a negative period runs backwards."""
    angle = phase + 2 * math.pi * time / period
    return centre + radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def check(shapes: Shapes) -> None:
    """Raises `UserError` where the shapes don't fit the canvas."""
    for key in ("image_size", "square_size", "disk_radius"):
        if getattr(shapes, key) <= 0:
            raise UserError(f"dataset.shapes.{key}: must be above 0, is {getattr(shapes, key)}")
    for key in ("square_init", "square_vel"):
        value = getattr(shapes, key)
        if value is not None and len(value) != 2:
            raise UserError(f"dataset.shapes.{key}: must be [x, y], is {value}")
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
