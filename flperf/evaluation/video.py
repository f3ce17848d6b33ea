"""Frames to MP4 files with PyAV: H.264, no system ffmpeg."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

FRAMES_PER_SECOND = 12.0  # of previews whose own rate is not known


def convert_video_tensor_to_mp4(video_tensor: Tensor) -> tuple[np.ndarray, float]:
    """`t c h w`, uint8 or float in [0, 1], to what `save_mp4_video` takes: frames uint8 `t h w c`, and a frame rate.

    Odd heights and widths are padded by a repeated line, since H.264 halves the resolution of colours.
    """
    if video_tensor.ndim != 4 or video_tensor.shape[1] not in (1, 3):
        raise ValueError(f"video: expected t c h w with 1 or 3 channels, got {list(video_tensor.shape)}")
    video = video_tensor.detach().cpu()
    if video.is_floating_point():
        video = (video.clamp(0, 1) * 255).round()
    height, width = video.shape[-2:]
    padded = F.pad(video.float(), (0, width % 2, 0, height % 2), mode="replicate")
    frames = rearrange(padded.expand(-1, 3, -1, -1), "t c h w -> t h w c").byte()
    return frames.numpy(), FRAMES_PER_SECOND


def save_mp4_video(frames: np.ndarray, out_base_path: str | Path, fps: float) -> Path:
    """Write frames uint8 `t h w c` of even height and width to `<out_base_path>.mp4`; returns that path."""
    path = Path(f"{out_base_path}.mp4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "17", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return path
