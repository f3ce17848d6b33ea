"""Draws a square and a disk: a box of pixels, and a run of pixels in each row of the disk, computed on the device.

A GPU compares every pixel with both. A CPU writes all boxes, or runs, of one size by one call of NumPy; in memory that
was released it paints over the old shapes only, so that most of a frame is not touched. Four clips of 64 frames of
256 x 256 take 3 ms in this way, 10 ms if each frame is cleared and drawn by slices, 450 ms if every pixel is compared.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flperf.config import Shapes
from flperf.data.preprocessing import Size

Colour = tuple[int, int, int]
SQUARE_COLOUR = (230, 60, 50)
DISK_COLOUR = (60, 110, 235)
GREY = 16
BACKGROUND = (GREY, GREY, GREY)

# A box in each of n frames: first pixel and the pixel after the last, as (y, x); int64 `n 2` each.
Box = tuple[Tensor, Tensor]
# Up to r rows of a disk in each of n frames: row (the height for an empty one), first pixel, pixel after the last;
# int64 `n r` each.
Rows = tuple[Tensor, Tensor, Tensor]
# Blocks of pixels by size (rows, pixels a row): indices of their first pixels in a batch, int64 [n].
Blocks = dict[tuple[int, int], np.ndarray]


class Canvas:
    """Draws batches of frames, uint8 `b f h w c` on `device`, all of the same shape."""

    def __init__(self, frames: int, size: Size, device: torch.device):
        self.frames, self.size, self.device = frames, size, device
        self.released: list[tuple[Tensor, list[Blocks]]] = []  # batches, and the boxes around the shapes on them
        self.whole_frames = torch.compile(whole_frames) if device.type == "cuda" else whole_frames

    def draw(self, centres: np.ndarray, shapes: Shapes) -> tuple[Tensor, Callable[[], None] | None]:
        """Shapes at centres fp32 `b f 2 2`, the disk over the square: frames `b f h w c`, and what releases their
        memory for a later batch, if anything does."""
        square, disk, rows = extents(self._on_device(centres).flatten(0, 1), shapes, self.size)
        if self.device.type == "cpu":
            boxes = [boxes_by_size(box, self.size) for box in (square, disk)]
            return self._paint(len(centres), boxes, runs_by_length(rows, self.size))
        return self.whole_frames(square, rows, self.size).unflatten(0, centres.shape[:2]), None

    def _on_device(self, centres: np.ndarray) -> Tensor:
        """Copied from pinned memory: a copy from pageable memory would wait for the device."""
        host = torch.from_numpy(centres)
        return host if self.device.type == "cpu" else host.pin_memory().to(self.device, non_blocking=True)

    def _paint(self, b: int, boxes: list[Blocks], disk: Blocks) -> tuple[Tensor, Callable[[], None]]:
        if self.released:
            video, old_boxes = self.released.pop()
        else:
            video, old_boxes = torch.full((b, self.frames, *self.size, 3), GREY, dtype=torch.uint8), []
        for old in old_boxes:
            paint(video, old, BACKGROUND)
        paint(video, boxes[0], SQUARE_COLOUR)
        paint(video, disk, DISK_COLOUR)
        return video, partial(self.released.append, (video, boxes))


def extents(centres: Tensor, shapes: Shapes, size: Size) -> tuple[Box, Box, Rows]:
    """The boxes of square and disk at centres `n 2 2`, and the disk's rows. Computed in fp64, for the same pixels on
    every device."""
    square, disk = centres.double().unbind(1)
    scale = [length / shapes.image_size for length in size]
    boxes = _box(square, shapes.square_size / 2, scale, size), _box(disk, shapes.disk_radius, scale, size)
    return *boxes, _disk_rows(disk, shapes.disk_radius, scale, size)


def _box(centres: Tensor, half: float, scale: list[float], size: Size) -> Box:
    """The pixels whose centres are within `half`, in x and in y, of centres `n 2` as (x, y)."""
    axes = list(zip(centres.flip(1).unbind(1), scale, size, strict=True))
    first = torch.stack([torch.ceil((centre - half) * factor - 0.5).clamp(min=0) for centre, factor, _ in axes], dim=1)
    end = torch.stack(
        [(torch.floor((centre + half) * factor - 0.5) + 1).clamp(max=length) for centre, factor, length in axes], dim=1
    )
    return first.long(), end.long()


def _disk_rows(centres: Tensor, radius: float, scale: list[float], size: Size) -> Rows:
    """The pixels whose centres are no further than `radius` from centres `n 2` as (x, y)."""
    (height, width), (y_scale, x_scale) = size, scale
    x, y = centres[:, :, None].unbind(1)  # n 1
    offsets = torch.arange(math.floor(2 * radius * y_scale) + 1, device=centres.device)
    row = torch.ceil((y - radius) * y_scale - 0.5) + offsets  # n r
    squared = radius**2 - ((row + 0.5) / y_scale - y).square()
    half = squared.clamp(min=0).sqrt()
    left = torch.ceil((x - half) * x_scale - 0.5).clamp(min=0)
    right = torch.floor((x + half) * x_scale - 0.5).clamp(max=width - 1) + 1
    visible = (squared >= 0) & (row >= 0) & (row < height) & (right > left)
    return torch.where(visible, row, height).long(), left.long(), right.long()


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


def boxes_by_size(box: Box, size: Size) -> Blocks:
    """The boxes of all frames of a batch."""
    (top, left), extent = box[0].T, box[1] - box[0]
    first = ((torch.arange(len(top)) * size[0] + top) * size[1] + left).tolist()
    blocks: dict[tuple[int, int], list[int]] = {}
    for index, (rows, length) in zip(first, extent.tolist(), strict=True):
        if rows > 0 and length > 0:
            blocks.setdefault((rows, length), []).append(index)
    return {extent: np.array(indices) for extent, indices in blocks.items()}


def runs_by_length(rows: Rows, size: Size) -> Blocks:
    """The disk's rows in all frames of a batch, as blocks of one row."""
    height, width = size
    row, left, right = (part.numpy() for part in rows)
    visible = row < height
    first = ((np.arange(len(row))[:, None] * height + row) * width + left)[visible]
    length = (right - left)[visible].astype(np.uint16)  # NumPy sorts 16 bits by radix
    first = first[np.argsort(length, kind="stable")]
    counts = np.bincount(length)
    ends = counts.cumsum()
    return {(1, n): first[ends[n] - counts[n] : ends[n]] for n in counts.nonzero()[0].tolist()}


def paint(video: Tensor, blocks: Blocks, colour: Colour) -> None:
    """Fill blocks of pixels of a batch, uint8 `b f h w c`. One call writes all blocks of a size; it copies each row of
    a block as one item."""
    pixels, width = video.view(-1).numpy(), video.shape[-2]
    for (rows, length), first in blocks.items():
        item = np.dtype((np.void, 3 * length))
        count = pixels.size // 3 - (rows - 1) * width - length + 1
        # [i, r]: the item that begins r rows below pixel i
        items = np.ndarray((count, rows), item, pixels, strides=(3, 3 * width))
        items[first] = np.frombuffer(bytes(colour) * length, item)
