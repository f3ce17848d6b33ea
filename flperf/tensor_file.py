"""Safetensors files that say in their metadata what they are."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flperf.config import UserError


def read_tensor_file(path: str | Path, file_format: str, writer: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name and metadata of a file of `file_format`, which `writer` writes. Raises `UserError` that names the file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a safetensors file that can be read ({error})") from None
    if metadata.get("format") != file_format:
        raise UserError(f"{path}: was not written by `{writer}` (format {metadata.get('format')!r}, expected {file_format!r})")
    return tensors, metadata
