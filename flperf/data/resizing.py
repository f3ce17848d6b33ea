"""Resizes frames on a CPU with a kernel of its own, which gives the same bytes as torch's operator in less than a third
of the time. It is compiled once for a user. Without a compiler or AVX2, torch resizes.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flperf.data.preprocessing import Preprocessing

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = (os.environ.get("CXX"), "g++", "clang++")
OPTIONS = ("-O3", "-std=c++17", "-shared", "-fPIC")


def resize_into(frame: Tensor, out: Tensor, preprocessing: Preprocessing) -> None:
    """Write a frame, uint8 `h w c`, into `out`, resized and cropped: the bytes of `preprocessing.apply`. Both are on
    the CPU; `out` is contiguous."""
    frame = preprocessing.visible(frame)
    if preprocessing.resize is None:  # it was prepared
        out.copy_(frame)
        return
    kernel = compiled_kernel()
    plan = _plan(preprocessing, *frame.shape[:2]) if kernel else None
    if kernel is None or plan is None:
        out.copy_(replace(preprocessing, shown=None).apply(frame[None])[0])
        return
    if frame.stride()[1:] != (3, 1):
        frame = frame.contiguous()
    height, width, _ = frame.shape
    kernel(frame.data_ptr(), frame.stride(0), height, width, out.data_ptr(), out.shape[1], plan.columns, plan.rows)


@lru_cache(1)
def compiled_kernel() -> Callable | None:
    """`resize` of resizing.cpp, which lets other threads run; None where it can't be used."""
    if platform.machine() != "x86_64":
        return None
    try:
        library = _load()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = str(getattr(error, "stderr", None) or error).strip()
        logger.warning("torch resizes frames, which takes three times as long: %s", reason)
        return None
    kernel = library.resize
    kernel.argtypes = [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_int32] * 2, ctypes.c_void_p, ctypes.c_int32]
    kernel.argtypes += [ctypes.POINTER(_Axis)] * 2
    kernel.restype = None
    return kernel if library.is_supported() else None


def _load() -> ctypes.CDLL:
    """The compiled file, from the user's cache if it is there. Raises `OSError`, or `CalledProcessError` if the
    compiler fails."""
    content = SOURCE.read_bytes() + " ".join(OPTIONS).encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "flperf")
    path = cache / f"resizing-{hashlib.sha256(content).hexdigest()[:16]}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    compiler = next((name for name in COMPILERS if name and shutil.which(name)), None)
    if compiler is None:
        raise OSError("no C++ compiler; apt install g++")
    with tempfile.TemporaryDirectory() as folder:
        built = os.path.join(folder, path.name)
        subprocess.run([compiler, *OPTIONS, "-o", built, str(SOURCE)], check=True, capture_output=True, text=True)
        library = ctypes.CDLL(built)
        with suppress(OSError):  # where nothing can be written, the next process compiles again
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as beside:
                os.replace(shutil.copy(built, beside), path)
    return library


class _Axis(ctypes.Structure):
    """`Axis` of resizing.cpp."""

    _fields_ = [
        ("size", ctypes.c_int32),
        ("pairs", ctypes.c_int32),
        ("precision", ctypes.c_int32),
        ("first", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, taps: "_Taps", weights: np.ndarray) -> "_Axis":
        first, weights = np.ascontiguousarray(taps.first), np.ascontiguousarray(weights)
        pairs = taps.weights.shape[1] // 2
        axis = cls(len(first), pairs, taps.precision, first.ctypes.data, weights.ctypes.data)
        axis.arrays = first, weights  # as long as it points to them
        return axis


class _Plan(NamedTuple):
    columns: _Axis
    rows: _Axis


class _Taps(NamedTuple):
    """The pixels of one axis that each position is a sum of."""

    first: np.ndarray  # int32 [positions]
    weights: np.ndarray  # int16 [positions, pixels]; an even number of pixels
    precision: int  # bits behind the point


@lru_cache
def _plan(preprocessing: Preprocessing, height: int, width: int) -> _Plan | None:
    """What the kernel needs for frames of one size; None if they are too small for it."""
    (top, left), (rows, columns) = preprocessing.geometry(height, width).offset, preprocessing.size
    resized = preprocessing.geometry(height, width).resized
    vertical = _taps(height, resized[0], slice(top, top + rows))
    horizontal = _taps(width, resized[1], slice(left, left + columns))
    if vertical.weights.shape[1] > height or horizontal.weights.shape[1] > width:
        return None
    added = -columns % 4
    first = np.pad(horizontal.first, (0, added), mode="edge")
    blocks = np.pad(horizontal.weights, ((0, added), (0, 0))).reshape(len(first) // 4, 2, 2, -1, 2)
    expanded = np.zeros((len(blocks), 2, blocks.shape[3], 2, 4, 2), np.int16)
    expanded[..., :3, :] = blocks.transpose(0, 2, 3, 1, 4)[..., None, :]  # the same for three channels
    return _Plan(_Axis.of(horizontal._replace(first=first), expanded), _Axis.of(vertical, vertical.weights))


def _taps(source: int, resized: int, crop: slice) -> _Taps:
    """torch's antialiased bilinear weights for bytes: normalised in double precision, then rounded to as many bits as
    let the largest weight of the axis fit into 16."""
    scale = source / resized
    reach = max(scale, 1.0)
    centre = scale * (np.arange(resized) + 0.5)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + reach + 0.5).astype(np.int64), source)
    pixels = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs((pixels - centre[:, None] + 0.5) * (1 / reach)), 0) * (pixels < last[:, None])
    weights /= weights.cumsum(1)[:, -1:]
    precision = max(bits for bits in range(1, 23) if int(weights.max() * 2**bits + 0.5) < 2**15)
    rounded = (weights * 2**precision + 0.5).astype(np.int16)
    added = rounded.shape[1] % 2
    rounded = np.pad(rounded, ((0, 0), (0, added)))
    start = np.minimum(first, max(source - rounded.shape[1], 0))  # the kernel reads them all
    for position in np.flatnonzero(start < first):
        rounded[position] = np.roll(rounded[position], first[position] - start[position])
    return _Taps(start[crop].astype(np.int32), rounded[crop], precision)
