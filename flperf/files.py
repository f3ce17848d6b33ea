"""Files that are whole at any moment, whatever is killed and however full the disk; and safetensors files that say
what they are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from flperf.errors import UserError

if TYPE_CHECKING:  # commands that only look at files need not wait for torch
    import numpy as np
    import torch
    from torch import Tensor


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Where to write what replaces `path` once it is on disk: complete or not at all. Raises `UserError` that names
    the file."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path):
        yield unfinished
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file by `content`, on disk, or leave it as it was. Raises `UserError` that names the file."""
    with atomic_file(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Put a folder's names on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an `OSError` inside into a `UserError` that names the file in question, by default `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written: {error.strerror}; "
            "mend that and start again: what was complete before is still there"
        ) from error


def word_sum(content: "np.ndarray") -> int:
    """Checksum of uint8 [n]: the sum modulo 2^64 of its little-endian 64-bit words, the last one padded with zeros. It
    runs at the speed of memory, and any single wrong word changes it."""
    whole = len(content) // 8 * 8
    words = int(content[:whole].view("<u8").sum(dtype="u8"))
    return (words + int.from_bytes(content[whole:].tobytes(), "little")) % 2**64


def read_tensor_file(
    path: str | Path, file_format: str, writer: str, device: "torch.device"
) -> tuple[dict[str, "Tensor"], dict[str, str]]:
    """Tensors by name and metadata of a file of `file_format`, which `writer` writes. Raises `UserError` that names
    the file."""
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
