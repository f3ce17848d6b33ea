"""Atomic writing."""

import os

import pytest

from flperf.errors import UserError
from flperf.files import write_atomically


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "before")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"!"))
    with pytest.raises(UserError, match=f"{path}: cannot be written: No space left on device"):
        write_atomically(path, "after")
    assert path.read_text() == "before"
