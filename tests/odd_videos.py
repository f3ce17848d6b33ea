"""Videos as cameras, recorders and editors leave them, written with PyAV, and what a player shows of them."""

import os
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIZE = 64, 96  # height and width
X265 = {"x265-params": "log-level=error:keyint=16:min-keyint=16:bframes=3:scenecut=0:pools=1:frame-threads=1"}
X264 = {"g": "16", "bf": "2", "sc_threshold": "0"}
os.environ.setdefault("SVT_LOG", "1")  # errors only
OPTIONS = {  # encoder → options
    "libx264": X264,
    "libx265": X265,
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "g": "16"},
    "libvpx": {"deadline": "realtime", "g": "16", "auto-alt-ref": "1", "lag-in-frames": "8"},
    "libsvtav1": {"preset": "12", "g": "16", "svtav1-params": "lp=1"},
    "mpeg4": {"bf": "2", "g": "16", "q": "4"},
    "mpeg2video": {"bf": "2", "g": "16", "q": "4"},
    "flv": {"g": "16", "q": "4"},
    "wmv2": {"g": "16", "q": "4"},
    "msmpeg4": {"g": "16", "q": "4"},
    "mjpeg": {},
    "apng": {},
}


@dataclass(frozen=True)
class Stored:
    """One packet of a file."""

    content: bytes
    pts: int | None
    dts: int | None
    is_keyframe: bool
    duration: int


def picture(index: int, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Frame `h w c` of a texture that moves and a bar that tells frames apart."""
    height, width = size
    coarse = np.random.default_rng(seed).integers(40, 216, (2 + height // 8, 40 + width // 8, 3), np.uint8)
    texture = np.kron(coarse, np.ones((8, 8, 1), np.uint8))
    frame = texture[index % 8 : index % 8 + height, 2 * index : 2 * index + width].copy()
    frame[:8] = (index * 37) % 256
    return frame


def encode(
    path: Path,
    codec: str,
    frames: int = 48,
    options: dict | None = None,
    prepare: Callable[[av.VideoStream], None] = lambda stream: None,
    size: tuple[int, int] = SIZE,
) -> Path:
    """Write a video; `prepare` may change the stream before anything is encoded."""
    with av.open(str(path), "w") as container:
        stream = add_stream(container, codec, options, size)
        prepare(stream)
        fill(container, stream, frames, size)
    return path


def add_stream(container, codec: str, options: dict | None = None, size: tuple[int, int] = SIZE) -> av.VideoStream:
    stream = container.add_stream(codec, rate=25, options=OPTIONS[codec] | (options or {}))
    stream.height, stream.width = size
    stream.pix_fmt = {"mjpeg": "yuvj420p", "apng": "rgb24"}.get(codec, "yuv420p")
    stream.codec_context.thread_count = 1
    return stream


def fill(container, stream: av.VideoStream, frames: int, size: tuple[int, int] = SIZE, seed: int = 0) -> None:
    """Encode frames into a stream."""
    for index in range(frames):
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(index, seed, size), format="rgb24")))
    container.mux(stream.encode(None))


def stored(path: Path) -> list[Stored]:
    """The packets of a file's first video stream."""
    with av.open(str(path)) as container:
        return [
            Stored(bytes(packet), packet.pts, packet.dts, packet.is_keyframe, packet.duration or 0)
            for packet in container.demux(video=0)
            if packet.size
        ]


def remux(source: Path, target: Path, packets: Iterable[Stored], options: dict | None = None) -> Path:
    """Write packets into another file with the stream of `source`."""
    with av.open(str(source)) as original, av.open(str(target), "w", options=options or {}) as container:
        stream = container.add_stream_from_template(original.streams.video[0])
        for kept in packets:
            packet = av.Packet(kept.content)
            packet.stream, packet.time_base = stream, original.streams.video[0].time_base
            packet.pts, packet.dts, packet.duration = kept.pts, kept.dts, kept.duration
            packet.is_keyframe = kept.is_keyframe
            container.mux_one(packet)
    return target


def replaced(packets: list[Stored], index: int, content: bytes) -> list[Stored]:
    """Packets of which one has another content."""
    return [*packets[:index], replace(packets[index], content=content), *packets[index + 1 :]]


def overwritten(content: bytes, start: int, end: int) -> bytes:
    """A packet of which a part is zeros, as where a disk was never written."""
    return content[:start] + bytes(end - start) + content[end:]


def joined(path: Path, sources: list[Path]) -> Path:
    """The packets of several files, one after the other, with the stream of the first."""
    packets: list[Stored] = []
    for source in sources:
        start = max((packet.dts + packet.duration for packet in packets), default=0)
        added = stored(source)
        offset = start - added[0].dts
        packets += [replace(packet, pts=packet.pts + offset, dts=packet.dts + offset) for packet in added]
    return remux(sources[0], path, packets)


def with_edits(source: Path, target: Path, edits: list[tuple[int, int]]) -> Path:
    """An MP4 whose edit list shows parts of `source`: (first frame, number of frames), with 25 frames a second."""
    content = bytearray(source.read_bytes())
    with av.open(str(source)) as container:
        video = container.streams.video[0]
        ticks = int(1 / video.time_base)
        first = min(packet.pts - packet.dts for packet in stored(source))
        first = min(packet.pts for packet in stored(source)) - min(packet.dts for packet in stored(source)) or first
    movie = struct.unpack(">I", content[content.find(b"mvhd") + 16 :][:4])[0]
    entries = [(frames * movie // 25, first + start * ticks // 25, 1 << 16) for start, frames in edits]
    old = content.find(b"edts") - 4
    size = struct.unpack(">I", content[old : old + 4])[0]
    body = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiI", *entry) for entry in entries)
    new = struct.pack(">I4sI4s", len(body) + 16, b"edts", len(body) + 8, b"elst") + body
    for box in (b"moov", b"trak"):
        at = content.find(box) - 4
        content[at : at + 4] = struct.pack(">I", struct.unpack(">I", content[at : at + 4])[0] + len(new) - size)
    content[old : old + size] = new
    target.write_bytes(content)
    return target


def with_message(content: bytes, message: bytes, is_hevc: bool) -> bytes:
    """A packet of an MP4 with a unit of supplemental information before its others."""
    unit = (b"\x4e\x01" if is_hevc else b"\x06") + message + b"\x80"
    return struct.pack(">I", len(unit)) + unit + content


def orientation_message(quarters: int, horizontal: bool = False, vertical: bool = False) -> bytes:
    """A display orientation: quarter turns counterclockwise, after flips."""
    bits = f"0{horizontal:b}{vertical:b}{quarters * 2**14:016b}" + "010" + "10"
    return bytes([47, 3]) + int(bits, 2).to_bytes(3, "big")


def decoded(path: Path, stream: int = 0) -> np.ndarray:
    """What a player shows of one video stream, `f h w c`, without turning it. It goes on after packets that can't be
    decoded."""
    frames: list[np.ndarray] = []
    with av.open(str(path)) as container:
        video = container.streams.video[stream]
        video.codec_context.thread_count = 1
        for packet in container.demux(video):
            with suppress(av.error.FFmpegError):
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return np.stack(frames)


def not_coded(time: int, bits: int = 5) -> bytes:
    """A picture of MPEG-4 that is not coded: nothing is shown for it (ISO 14496-2, 6.2.5)."""
    head = "01" + "0" + "1" + f"{time:0{bits}b}" + "1" + "0"
    padded = head + "0" + "1" * (-(len(head) + 1) % 8)
    return b"\0\0\1\xb6" + int(padded, 2).to_bytes(len(padded) // 8, "big")


class BitWriter:
    """Writes the fields of H.264 headers."""

    def __init__(self) -> None:
        self.bits = ""

    def put(self, value: int, count: int) -> "BitWriter":
        self.bits += f"{value:0{count}b}"
        return self

    def golomb(self, *values: int) -> "BitWriter":
        for value in values:
            self.bits += "0" * ((value + 1).bit_length() - 1) + f"{value + 1:b}"
        return self

    def unit(self, header: int, samples: bytes = b"") -> bytes:
        """A NAL unit with a start code, of the bits so far or of raw samples after them."""
        bits = self.bits + ("" if samples else "1")
        bits += "0" * (-len(bits) % 8)
        body = int(bits, 2).to_bytes(len(bits) // 8, "big") + samples
        return b"\0\0\0\1" + bytes([header]) + body.replace(b"\0\0\1", b"\0\0\3\1")


def uncoded_h264(path: Path, kinds: str, width: int = 32, height: int = 32, cropped: int = 0) -> Path:
    """H.264 of plain grey pictures, each either a frame ("F") or two fields, whose packets are apart ("f"). Picture i
    has the level 20 + 4 i. Every picture can be decoded without any other. `cropped` pixels on the left are not
    shown."""
    across, down = width // 16, height // 32
    parameters = BitWriter().put(66, 8).put(0, 8).put(40, 8).golomb(0, 4, 2, 1)  # frame numbers of 8 bits
    parameters.put(0, 1).golomb(across - 1, down - 1).put(0, 2).put(1, 1)
    if cropped:
        parameters.put(1, 1).golomb(cropped // 2, 0, 0, 0)
    parameters.put(0, 1 if cropped else 2)
    pictures = BitWriter().golomb(0, 0).put(0, 1).put(0, 1).golomb(0, 0, 0).put(0, 1).put(0, 2)
    pictures.golomb(0, 0, 0).put(1, 1).put(0, 1).put(0, 1)
    content = parameters.unit(0x67) + pictures.unit(0x68)
    units = []
    for index, kind in enumerate(kinds):
        for field in [None] if kind == "F" else [0, 1]:  # top, bottom
            slice_header = BitWriter().golomb(0, 7, 0).put(0, 8).put(int(field is not None), 1)
            if field is not None:
                slice_header.put(field, 1)
            if field == 1:  # belongs to the picture before it
                slice_header.put(0, 1)
            else:
                slice_header.golomb(index % 2).put(0, 2)
            slice_header.golomb(0, 1)  # no change of the quantiser, no deblocking
            macroblocks = across * down * (2 if field is None else 1)
            units.append(_grey_slice(0x61 if field == 1 else 0x65, slice_header, macroblocks, 20 + 4 * index))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height = width, height
        stream.codec_context.extradata = content
        for position, unit in enumerate(units):
            packet = av.Packet((content if position == 0 else b"") + unit)
            packet.stream, packet.time_base = stream, Fraction(1, 50)
            packet.pts = packet.dts = position
            packet.is_keyframe = True
            container.mux_one(packet)
    return path


def _grey_slice(kind: int, header: BitWriter, macroblocks: int, level: int) -> bytes:
    """A slice of macroblocks whose samples are stored as they are (I_PCM)."""
    bits, body = header.bits, b""
    for _ in range(macroblocks):
        bits += "0000" + "11010"  # mb_type 25
        bits += "0" * (-len(bits) % 8)
        body += int(bits, 2).to_bytes(len(bits) // 8, "big") + bytes([level]) * 256 + bytes([128]) * 128
        bits = ""
    return b"\0\0\0\1" + bytes([kind]) + body + b"\x80"
