"""Video files for benchmarks: moving noise over a texture, which costs about as much to decode as real clips."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np

RATE = Fraction(30)


@dataclass(frozen=True)
class VideoFormat:
    """How files are encoded. Options are the encoder's own."""

    width: int = 340
    height: int = 256
    extension: str = "mp4"
    codec: str = "libx264"
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=lambda: {"crf": "23", "preset": "medium"})


def encode_videos(folder: Path, count: int, frames: int, video_format: VideoFormat, threads: int = 1) -> list[str]:
    """Write `count` files of `frames` frames, several at once; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / f"{index}.{video_format.extension}") for index in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(partial(_write_video, frames=frames, video_format=video_format), paths, range(count)))
    return paths


def _write_video(path: str, seed: int, frames: int, video_format: VideoFormat) -> None:
    random = np.random.default_rng(seed)
    width, height = video_format.width, video_format.height
    blocks = (max(40, -(-(height + frames) // 16)), max(60, -(-(width + 2 * frames) // 16)), 3)
    texture = np.kron(random.integers(0, 160, blocks, dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    with av.open(path, "w") as container:
        stream = container.add_stream(video_format.codec, rate=RATE, options=video_format.options)
        stream.width, stream.height, stream.pix_fmt = width, height, video_format.pixels
        for frame in range(frames):
            noise = random.integers(0, 16, (height, width, 1), dtype=np.uint8)
            image = texture[frame : frame + height, 2 * frame : 2 * frame + width] + noise
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
