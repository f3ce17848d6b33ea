"""The kernel that resizes frames on a CPU, compared with torch."""

import logging
import subprocess

import numpy as np
import pytest
import torch

from flperf.config import Backbone
from flperf.data import resizing
from flperf.data.preprocessing import Preprocessing
from flperf.data.resizing import compiled_kernel, resize_into

CROPS = [Preprocessing.of(Backbone(architecture={"crop_size": size})) for size in (16, 57, 64, 256)]
SQUEEZED = [Preprocessing.of(Backbone(kind="dinov3", architecture={"image_size": size})) for size in (48, 98)]


@pytest.fixture(autouse=True)
def kernel():
    if compiled_kernel() is None:
        pytest.skip("neither AVX2 nor a compiler")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A user whose cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled_kernel.cache_clear()
    yield tmp_path / "cache" / "flperf"
    compiled_kernel.cache_clear()


def noise(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))


def resized(frame: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Checks that nothing is written beside the result."""
    height, width = preprocessing.size
    around = torch.full((height + 2, width, 3), 77, dtype=torch.uint8)
    resize_into(frame, around[1:-1], preprocessing)
    assert (around[[0, -1]] == 77).all()
    return around[1:-1]


def same(frame: torch.Tensor, preprocessing: Preprocessing) -> bool:
    return torch.equal(resized(frame, preprocessing), preprocessing.apply(frame[None])[0])


@pytest.mark.parametrize("preprocessing", CROPS + SQUEEZED, ids=lambda p: f"{p.resize}, {p.crop}")
def test_frames_of_random_sizes_bit_for_bit(preprocessing):
    """Enlarged and reduced up to thirty times; rows have gaps between them, as in a decoder's memory."""
    random = np.random.default_rng(0)
    for _ in range(40):
        height, width = (int(2 ** random.uniform(1, 9.5)) for _ in range(2))
        frame = noise(random, height, width + int(random.integers(0, 9)), 3)[:, :width]
        assert same(frame, preprocessing), frame.shape


@pytest.mark.parametrize("size", [(256, 340), (340, 256), (292, 387), (293, 292), (720, 1280), (1080, 1920)])
def test_usual_frames_bit_for_bit(size):
    random = np.random.default_rng(1)
    assert same(noise(random, *size, 3), CROPS[-1])
    for level in (0, 1, 254, 255):  # sums of weights are rounded, too
        assert same(torch.full((*size, 3), level, dtype=torch.uint8), CROPS[-1])


def test_frames_whose_pixels_lie_elsewhere():
    """Planes, mirrored and turned frames, as they may come from the caller."""
    frame = noise(np.random.default_rng(2), 3, 90, 110).permute(1, 2, 0)
    for view in (frame, frame.transpose(0, 1), frame.contiguous()[::2], frame.contiguous()[:, ::2]):
        assert same(view, CROPS[2])


def test_tiny_frames_are_left_to_torch():
    for size in [(1, 1), (1, 9), (9, 1), (2, 2), (3, 2)]:
        assert same(noise(np.random.default_rng(3), *size, 3), CROPS[0]), size


def test_it_is_compiled_once(fresh, monkeypatch):
    assert compiled_kernel() is not None and len(list(fresh.iterdir())) == 1
    compiled_kernel.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)
    assert compiled_kernel() is not None


def test_without_a_cache_it_is_compiled_each_time(fresh):
    fresh.parent.write_text("a file where the folder would be")
    assert compiled_kernel() is not None


@pytest.mark.parametrize("fault", ["no compiler", "a compiler that fails", "a damaged file"])
def test_torch_resizes_where_there_is_no_kernel(fresh, monkeypatch, caplog, fault):
    if fault == "no compiler":
        monkeypatch.setattr(resizing, "COMPILERS", (None, "no-such-compiler"))
    elif fault == "a compiler that fails":
        monkeypatch.setattr(resizing, "OPTIONS", ("--no-such-option",))
    else:
        compiled_kernel()
        next(fresh.iterdir()).write_bytes(b"")
        compiled_kernel.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert same(noise(np.random.default_rng(4), 90, 110, 3), CROPS[2])
        assert same(noise(np.random.default_rng(5), 90, 110, 3), CROPS[2])
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "torch resizes frames, which takes three times as long"
    ]
