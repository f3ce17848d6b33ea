"""Clips of bouncing shapes a second, 64 frames of 256 x 256, against drawing them with PIL:

    python -m pytest benchmarks/test_shapes.py

`PIL` draws each frame and stacks the pictures into one array `f h w c`; `PIL, f c h w` hands them on as FutureLatents' dataset does.
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from flperf.config import Shapes
from flperf.data.shapes import BACKGROUND, DISK_COLOUR, SQUARE_COLOUR, Canvas, clip_centres

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


canvas = Canvas(FRAMES, (SIZE, SIZE), torch.device("cpu"))
WAYS = {
    "PIL": lambda: [drawn_with_pil(centres) for centres in CENTRES],
    "PIL, f c h w": lambda: [channels_first(drawn_with_pil(centres)) for centres in CENTRES],
    "runs of pixels": lambda: canvas.draw(CENTRES, SHAPES),
}


@pytest.mark.benchmark(group="bouncing shapes, 64 frames of 256 x 256")
@pytest.mark.parametrize("way", WAYS)
def test_drawing(record, way):
    record(WAYS[way], "clips", CLIPS, rounds=20)
