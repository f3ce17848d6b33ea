"""The demo's data: a small folder in Kinetics format, written on first use, so that nothing has to be downloaded.

A shape moves over a drifting texture; the class is the shape and its kind of motion. All motion has constant speed, so
a few frames determine the rest. Half of the clips are VP9 in WebM, half H.264 in MP4.
"""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np

from flperf.data.bouncing_shapes import bounce, circle
from flperf.errors import UserError

CLASSES = ("bouncing square", "bouncing disk", "circling square", "circling disk")
SPLITS = {"train": 96, "validation": 16}
FRAMES_PER_SECOND = 24
SIZES = ((64, 80), (72, 72), (80, 64))  # (height, width)
CODECS = (
    ("webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0"}),
    ("mp4", "libx264", {"preset": "veryfast", "crf": "20"}),
)


def write_demo(folder: str | Path, splits: dict[str, int] | None = None) -> None:
    """Write `train.csv`, `validation.csv`, `labels.csv` and `videos/`. `splits` are the numbers of clips, by default
    `SPLITS`. The folder appears complete or not at all. Raises `UserError` if it exists and is not a demo."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as unfinished:
        draft = Path(unfinished) / folder.name
        _write_folder(draft, splits or SPLITS)
        try:
            draft.rename(folder)
        except OSError:  # another run was quicker, or the folder holds something else
            if not (folder / "train.csv").is_file():
                raise UserError(
                    f"{folder}: exists but has no train.csv of the demo; remove it or point dataset.train elsewhere"
                ) from None


def _write_folder(folder: Path, splits: dict[str, int]) -> None:
    (folder / "videos").mkdir(parents=True)
    (folder / "labels.csv").write_text("".join(f"{index} {name}\n" for index, name in enumerate(CLASSES)))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for split, count in splits.items():
            first = 0 if split == "train" else splits["train"]
            rows = list(pool.map(lambda index: _write_clip(folder, index), range(first, first + count)))
            (folder / f"{split}.csv").write_text("".join(rows))


def _write_clip(folder: Path, index: int) -> str:
    """Write one video and return its row."""
    extension, codec, options = CODECS[index % 2]
    label = index // 2 % len(CLASSES)
    name = f"videos/clip_{index:02}.{extension}"
    _encode(folder / name, _draw_clip(index, label), codec, options)
    return f"{name} {label}\n"


def _draw_clip(index: int, label: int) -> np.ndarray:
    """Frames of one clip, uint8 `f h w c`: a pure function of the index."""
    random = np.random.default_rng((20_240, index))
    height, width = SIZES[random.integers(len(SIZES))]
    time = np.arange(random.integers(33, 41), dtype=float)
    radius = random.uniform(9, 14)
    if "bouncing" in CLASSES[label]:
        heading, speed = random.uniform(0, 2 * np.pi), random.uniform(1.2, 2.4)
        velocity = speed * np.array([np.cos(heading), np.sin(heading)])
        walls = np.array([width, height]) - radius
        centres = bounce(random.uniform(radius, walls), velocity, time, radius, walls)
    else:
        period = random.uniform(28, 48) * random.choice([-1, 1])
        centres = circle(0.0, height / 2 - radius, random.uniform(0, 2 * np.pi), period, time) + np.array(
            [width / 2, height / 2]
        )
    inside = _inside(centres, radius, height, width, square="square" in CLASSES[label])
    frames = _drifting_texture(random, time, height, width)
    frames[inside] = np.concatenate([random.integers(160, 256, 2), random.integers(0, 80, 1)])[random.permutation(3)]
    return frames


def _inside(centres: np.ndarray, radius: float, height: int, width: int, square: bool) -> np.ndarray:
    """Mask `f h w` of the shape at centres `f 2` as (x, y)."""
    dx = np.abs(np.arange(width) + 0.5 - centres[:, 0, None])[:, None, :]
    dy = np.abs(np.arange(height) + 0.5 - centres[:, 1, None])[:, :, None]
    return (np.maximum(dx, dy) <= radius) if square else (dx**2 + dy**2 <= radius**2)


def _drifting_texture(random: np.random.Generator, time: np.ndarray, height: int, width: int) -> np.ndarray:
    """A periodic texture of a few waves that drifts at constant velocity, `f h w c`."""
    drift = random.uniform(-1, 1, 2)
    y = (np.arange(height) - drift[0] * time[:, None])[:, :, None].astype(np.float32)
    x = (np.arange(width) - drift[1] * time[:, None])[:, None, :].astype(np.float32)
    # Each clip has its own constant colour: easy to know from the context, impossible from the mean over clips.
    frames = np.tile(random.uniform(46, 146, 3).astype(np.float32), (len(time), height, width, 1))
    for _ in range(4):
        frequency = random.uniform(-0.35, 0.35, 2).astype(np.float32)
        wave = np.sin(frequency[0] * y + frequency[1] * x + np.float32(random.uniform(0, 2 * np.pi)))  # f h w
        frames += wave[..., None] * random.uniform(6, 18, 3).astype(np.float32)
    return frames.clip(0, 255).astype(np.uint8)


def _encode(path: Path, frames: np.ndarray, codec: str, options: dict[str, str]) -> None:
    with av.open(str(path), "w") as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=Fraction(FRAMES_PER_SECOND), options=options))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
