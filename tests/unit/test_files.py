"""Atomic writing."""

import os
import resource

import pytest
import torch
from safetensors.torch import save_file

from flperf.errors import UserError
from flperf.files import write_atomically, writing


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "before")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"!"))
    with pytest.raises(UserError, match=f"{path}: cannot be written: No space left on device"):
        write_atomically(path, "after")
    assert path.read_text() == "before"


def test_a_full_disk_is_one_line_whoever_writes(tmp_path):
    """safetensors has an error of its own for it."""
    file, limits = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=f"{file}: cannot be written: .*File too large"), writing(file):
            save_file({"a": torch.zeros(1000)}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
