"""Writes files atomically, so that a kill or a full disk leaves no half-written file, and reads safetensors files that
name their format."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from safetensors import SafetensorError, safe_open

from flperf.errors import UserError, first_line

if TYPE_CHECKING:  # some commands use files but not torch, which takes seconds to import
    import numpy as np
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a path to write to. That file replaces `path` when it is on disk, or not at all. Raises `UserError` that
    names the file."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path):
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by `content`, or leave it as it was. Raises `UserError` that names the file."""
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def make_folder(folder: Path) -> None:
    """Make the folder that --out names, if it does not exist. Raises `UserError` that names it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {folder} can't be made a folder ({error.strerror})") from None


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of writing in the context into a `UserError` that names its file, or `path` if it has none."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        file, reason = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{file}: cannot be written: {reason}; fix that and start again; files that were complete before are intact"
        ) from error


@contextmanager
def locked(path: Path, who: str) -> Iterator[TextIO]:
    """The file, made if it does not exist, while no other process has it. Raises `UserError` if one has: another `who`.
    The text of the file is UTF-8, with bytes that are not as they are."""
    with writing(path), open(path, "a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: another `{who}` is writing it; wait for that, or change --out") from None
        except OSError as error:  # a file system without locks
            logger.debug("%s: is not locked: %s", path, error)
        yield file


def word_sum(content: "np.ndarray") -> int:
    """Checksum of uint8 [n]: the sum modulo 2^64 of its little-endian 64-bit words, the last one padded with zeros. It
    runs at the speed of memory, and any single wrong word changes it."""
    whole = len(content) // 8 * 8
    words = int(content[:whole].view("<u8").sum(dtype="u8"))
    return (words + int.from_bytes(content[whole:].tobytes(), "little")) % 2**64


def read_tensor_file(
    path: str | Path, file_format: str, writer: str, device: "torch.device"
) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors by name, and the metadata, of a file of format `file_format`, which `writer` writes. Raises `UserError`
    that names the file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a safetensors file that can be read ({error})") from None
    if metadata.get("format") != file_format:
        raise UserError(
            f"{path}: was not written by `{writer}` (format {metadata.get('format')!r}, expected {file_format!r})"
        )
    return tensors, metadata
