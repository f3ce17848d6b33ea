"""What DALI can be relied on for: files that it decodes to the frames that PyAV decodes, and how its colours are
corrected. Importing it does not import DALI, which takes a second."""

import torch
from torch import Tensor

from flperf.data.preprocessing import BLOCK
from flperf.data.pyav import display_orientation
from flperf.data.video_file import VideoFile

CPU_CODECS = ("vp8", "vp9", "mjpeg")
# Smallest height and width that NVDEC decodes (Video Codec SDK, NVDEC application note). MPEG-4 is left out: its frames
# came out wrong.
GPU_CODECS = {"h264": (16, 48), "hevc": (144, 144), "vp8": (16, 48), "vp9": (128, 128), "av1": (128, 128)}
GPU_FORMATS = ("yuv420p", "yuvj420p")  # every NVDEC decodes these codecs in these pixel formats
# Shares of red and blue in luma, by colour space (ITU-T H.273, MatrixCoefficients). DALI always converts by BT.601
BT_601 = 0.299, 0.114
LUMA_SHARES = {1: (0.2126, 0.0722), 7: (0.212, 0.087), 9: (0.2627, 0.0593)} | dict.fromkeys((2, 4, 5, 6), BT_601)
PROGRESSIVE = 1  # field order (FFmpeg, AVFieldOrder); 0 is unknown


def colour_correction(file: VideoFile) -> list[list[float]] | None:
    """The rows of the matrix that maps RGB as DALI converts it to that of the file's colour space; None if they agree.
    It is the same for the full and the limited range."""
    shares = LUMA_SHARES[file.context.colorspace]
    if shares == BT_601:
        return None
    return (_to_rgb(*shares) @ torch.linalg.inv(_to_rgb(*BT_601))).tolist()


def _to_rgb(red: float, blue: float) -> Tensor:
    """The matrix from (Y, U, V) to RGB by the shares of red and blue in luma."""
    green = 1 - red - blue
    of_u = [0, -2 * blue * (1 - blue) / green, 2 * (1 - blue)]
    of_v = [2 * (1 - red), -2 * red * (1 - red) / green, 0]
    return torch.tensor([[1, 1, 1], of_u, of_v], dtype=torch.float64).T


def find_obstacle(file: VideoFile, device: str, *, reusing: bool = False) -> str | None:
    """Why DALI can't decode a file on a device of this type ("cpu" or "cuda"), or might choose other frames than PyAV;
    None if nothing is known against it. DALI relies on the header and the order of presentation times. With `reusing`,
    a file for which it would build a decoder is refused too."""
    if file.timeline.counted:
        return f"DALI can't tell the frames of a file if {file.timeline.counted}"
    if file.stream.frames not in (0, len(file.infos)) or file.is_cut_short:
        return "the header of a file does not agree with its packets"
    if file.has_edits:
        return "DALI doesn't apply edit lists"
    if len(file.container.streams.video) > 1:
        return "DALI doesn't choose between video streams"
    if file.context.field_order > PROGRESSIVE:
        return "DALI doesn't say what it does with interlaced video"
    if not file.has_one_size:
        return "DALI doesn't decode frames of several sizes"
    unsupported = _unsupported(file.context, device, reusing)
    if unsupported:
        return unsupported
    if file.context.colorspace not in LUMA_SHARES:
        return f"DALI doesn't convert colour space {file.context.colorspace}"
    # last, since they read all packets or decode a frame
    if file.is_damaged:
        return "DALI doesn't notice damage"
    if file.orientations or display_orientation(file.first_frame()):
        return "DALI doesn't apply display matrices"
    return None


def _unsupported(context, device: str, reusing: bool) -> str | None:
    """Why DALI can't decode the codec of this context, or None."""
    codec = context.codec.canonical_name
    if codec not in (CPU_CODECS if device == "cpu" else GPU_CODECS):
        return f"DALI doesn't decode {codec} on a {'CPU' if device == 'cpu' else 'GPU'}"
    if device == "cuda":
        height, width = GPU_CODECS[codec]
        if context.pix_fmt not in GPU_FORMATS:
            return f"NVDEC doesn't decode {codec} in {context.pix_fmt}"
        if context.height < height or context.width < width:
            return f"NVDEC doesn't decode {codec} of less than {width} x {height} pixels"
        # DALI 2.4 keeps NVDEC's decoders by the size of the picture, and looks them up by the coded size, that of whole
        # blocks. Where the two differ it builds a decoder for every clip.
        if reusing and (context.height % BLOCK or context.width % BLOCK):
            return f"DALI builds an NVDEC decoder for every clip whose sides are no multiples of {BLOCK}"
    return None
