"""Clips of bouncing shapes a second, 64 frames of 256 x 256, in turns with drawing the same clips with PIL on the CPU:

    python -m pytest benchmarks/test_shapes.py

`PIL` draws each frame and stacks the pictures into one array `f h w c`; `PIL, f c h w` transposes them as
FutureLatents' dataset does. Taking turns, each finds the caches cold, as between two steps of training.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from benchmarks.sizes import DEVICE
from flperf.config import Shapes
from flperf.data.bouncing_shapes import clip_centres
from flperf.data.canvas import BACKGROUND, DISK_COLOUR, SQUARE_COLOUR, Canvas

SHAPES, FRAMES, SIZE, CLIPS = Shapes(), 64, 256, 4
CENTRES = clip_centres(list(range(CLIPS)), SHAPES, 0, FRAMES, 1)


def drawn_with_pil(centres: np.ndarray) -> np.ndarray:
    pictures, half, radius = [], SHAPES.square_size / 2, SHAPES.disk_radius
    for (x, y), (u, v) in centres:
        picture = Image.new("RGB", (SIZE, SIZE), BACKGROUND)
        brush = ImageDraw.Draw(picture)
        brush.rectangle([x - half, y - half, x + half, y + half], fill=SQUARE_COLOUR)
        brush.ellipse([u - radius, v - radius, u + radius, v + radius], fill=DISK_COLOUR)
        pictures.append(np.array(picture))
    return np.stack(pictures)


def channels_first(video: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(video).permute(0, 3, 1, 2).contiguous()


WAYS_OF_PIL = {
    "PIL": lambda: [drawn_with_pil(centres) for centres in CENTRES],
    "PIL, f c h w": lambda: [channels_first(drawn_with_pil(centres)) for centres in CENTRES],
}


@pytest.mark.benchmark(group="bouncing shapes, 64 frames of 256 x 256")
def test_drawing(record):
    canvas = Canvas(FRAMES, (SIZE, SIZE), DEVICE)

    def draw_and_release():
        _, release = canvas.draw(CENTRES, SHAPES)
        if release:
            release()

    record(draw_and_release, "clips", CLIPS, rounds=20, beside=WAYS_OF_PIL)
