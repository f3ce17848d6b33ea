"""Copies to the device: the same batches in the same order, their memory, and the end of the threads behind them."""

from functools import partial

import pytest
import torch

from flperf.data.prefetch import prefetch_to_device
from flperf.data.samplers import ClipBatch


class Source:
    """Three batches of latents, as a generator that records whether it was closed, and which batches were released."""

    def __init__(self, pinned: bool):
        index = torch.arange(2)
        latents = [torch.full((2, 8, 16, 16, 256), float(i), pin_memory=pinned) for i in range(3)]
        self.closed, self.released = False, []
        self.batches = [
            ClipBatch(index, index, index + i, index >= 0, latents=x, on_release=partial(self.released.append, i))
            for i, x in enumerate(latents)
        ]

    def read(self):
        try:
            yield from self.batches
        finally:
            self.closed = True


def test_on_a_cpu_batches_pass_as_they_are_and_are_released_when_the_next_is_asked_for():
    source = Source(pinned=False)
    for number, batch in enumerate(prefetch_to_device(source.read(), torch.device("cpu"))):
        assert batch is source.batches[number] and source.released == list(range(number))
    assert source.released == [0, 1, 2]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_closing_ends_the_source(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    source = Source(pinned=device == "cuda")
    batches = prefetch_to_device(source.read(), torch.device(device))
    next(batches)
    batches.close()
    assert source.closed


@pytest.mark.gpu
def test_on_a_gpu_copies_hold_what_was_sent():
    source, device = Source(pinned=True), torch.device("cuda")
    work = torch.ones(4096, 4096, device=device)
    sums = []
    for batch in prefetch_to_device(source.read(), device):
        assert batch.latents.device.type == "cuda"
        # behind work that takes a while
        sums.append(((work @ work).sum() * 0 + batch.latents.double().mean(), batch.sample.tolist()))
        del batch  # its memory may be taken by the next copy, but not before it was read
    assert [(value.item(), sample) for value, sample in sums] == [(float(i), [i, i + 1]) for i in range(3)]
