"""Small videos of every kind that the data tests read, written once a session."""

from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.nn import functional as F

VIDEOS = {  # name → (codec, frames, height, width, pixel format, options)
    "h264.mp4": ("libx264", 70, 96, 130, "yuv420p", {"g": "24", "bf": "2"}),
    "portrait.mp4": ("libx264", 40, 130, 74, "yuv420p", {}),
    "short.mp4": ("libx264", 5, 96, 130, "yuv420p", {}),
    "hevc.mp4": ("libx265", 30, 96, 130, "yuv420p", {"x265-params": "log-level=error"}),
    "mpeg4.avi": ("mpeg4", 40, 96, 130, "yuv420p", {"bf": "2"}),
    "vp9.webm": ("libvpx-vp9", 60, 96, 130, "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "20"}),
    "hevc_large.mp4": ("libx265", 30, 160, 192, "yuv420p", {"x265-params": "log-level=error"}),
    "vp9_large.webm": ("libvpx-vp9", 40, 160, 192, "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "20"}),
    "vp9_short.webm": ("libvpx-vp9", 6, 74, 98, "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    "vp8.webm": ("libvpx", 50, 80, 110, "yuv420p", {"deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "8"}),
    "mjpeg.avi": ("mjpeg", 40, 96, 130, "yuvj420p", {}),
    "h264.ts": ("libx264", 70, 96, 130, "yuv420p", {"g": "24", "bf": "2"}),
    "variable.mkv": ("libx264", 40, 96, 130, "yuv420p", {"g": "12", "bf": "2"}),  # frames of 40 to 420 ms
}


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    """A folder with the files of VIDEOS, several broken files, and a name with a space."""
    folder = tmp_path_factory.mktemp("videos")
    for index, (name, specification) in enumerate(VIDEOS.items()):
        _write_video(folder / name, index, *specification)
    (folder / "with a space.mp4").write_bytes((folder / "h264.mp4").read_bytes())
    good = (folder / "vp9_large.webm").read_bytes()  # large enough for NVDEC
    (folder / "empty.webm").write_bytes(b"")
    (folder / "text.mp4").write_text("no video at all\n" * 100)
    (folder / "truncated.mp4").write_bytes((folder / "h264.mp4").read_bytes()[:4000])
    (folder / "stray.ts").write_bytes(_with_a_stray_stream((folder / "h264.ts").read_bytes()))
    _write_video(folder / "no_frames.mp4", 0, "mjpeg", 0, 96, 130, "yuvj420p", {})
    (folder / "damaged.webm").write_bytes(
        bytes(b ^ (0xFF if i > 1500 and i % 211 == 0 else 0) for i, b in enumerate(good))
    )
    _write_audio(folder / "audio.mp4")
    return folder


@pytest.fixture(scope="session")
def decode_all():
    """All frames `f h w c` of a file by PyAV's simplest interface."""

    @cache
    def decode(path: Path) -> np.ndarray:
        with av.open(str(path)) as container:
            return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])

    return decode


def _write_video(
    path: Path, seed: int, codec: str, frames: int, height: int, width: int, pixels: str, options: dict
) -> None:
    colours = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (1, 3, 40, 50)))
    texture = F.interpolate(colours, scale_factor=8, mode="bilinear")[0].permute(1, 2, 0).byte().numpy()  # h w c
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        if path.stem == "variable":
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(frames):
            pixels_of_frame = np.ascontiguousarray(texture[index : index + height, 2 * index : 2 * index + width])
            frame = av.VideoFrame.from_ndarray(pixels_of_frame, format="rgb24")
            if path.stem == "variable":
                frame.pts, frame.time_base = 40 * index + 20 * (index // 4) ** 2, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _with_a_stray_stream(content: bytes) -> bytes:
    """A transport stream with one damaged byte in the first packet of the last frame: its identifier is that of no
    known stream."""
    # packets that begin a frame of stream 0x100
    starts = [start for start in range(0, len(content), 188) if content[start + 1 : start + 3] == b"\x41\x00"]
    return content[: starts[-1] + 2] + b"\x49" + content[starts[-1] + 3 :]


def _write_audio(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        for index in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 1024 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
