"""Shared memory: content, reuse, and what is kept for as long as a batch is."""

import gc
import os
from types import SimpleNamespace

import pytest
import torch

from flperf.data.shared_memory import Place, SharedMemory, map_block
from flperf.errors import UserError

SIZE = 3 * 4096 + 5


def filled(memory, value):
    tensor, release = memory.take(SIZE)
    return tensor.fill_(value), release


def test_another_mapping_sees_what_is_written_and_writes_what_is_seen():
    memory = SharedMemory(pinned=False)
    tensors = [filled(memory, value)[0] for value in (1, 2, 3)]
    for value, tensor in enumerate(tensors, start=1):
        place = memory.place(tensor[7:])
        assert place.offset == 7
        block = map_block(memory.descriptor, place)
        assert (block[:SIZE] == value).all()
        block[9] = 100
        assert tensor[9] == 100
    with pytest.raises(ValueError):
        memory.place(torch.zeros(3))


def test_released_or_dropped_memory_is_used_again():
    memory = SharedMemory(pinned=False)
    (first, release), (second, _) = filled(memory, 1), filled(memory, 2)
    addresses = [first.data_ptr(), second.data_ptr()]
    release()
    release()  # a batch may be released and then dropped
    del second
    gc.collect()
    again = [filled(memory, value)[0].data_ptr() for value in (3, 4)]
    assert again != addresses and len(memory.blocks) == 2
    kept = [memory.take(SIZE)[0] for _ in range(3)]
    assert len({tensor.data_ptr() for tensor in kept}) == 3


def test_a_view_keeps_the_memory():
    memory = SharedMemory(pinned=False)
    part = filled(memory, 7)[0].view(1, -1)[0, 5:9]
    gc.collect()
    others = [filled(memory, 8) for _ in range(3)]
    assert (part == 7).all() and len(memory.blocks) == 4, others


def test_tensors_outlive_the_memory_which_is_closed_with_the_last():
    before = len(os.listdir("/proc/self/fd"))
    memory = SharedMemory(pinned=False)
    tensor, release = filled(memory, 5)
    del memory
    gc.collect()
    assert (tensor == 5).all()
    del tensor, release
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_little_memory_is_one_line(monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(UserError, match="no memory for a batch of 0 MB .*dataset.prefetch"):
        SharedMemory(pinned=False).take(SIZE)


def test_places_are_aligned_for_mapping():
    memory = SharedMemory(pinned=False)
    places = [memory.place(memory.take(SIZE)[0]) for _ in range(1)]
    assert places == [Place(0, 4 * 4096, 0)]


def test_memory_that_cannot_be_pinned_is_used_all_the_same(monkeypatch, caplog):
    """As under drivers that do not let user memory be registered."""
    refusing = SimpleNamespace(cudaHostRegister=lambda *_: 801)

    def fail(*_, **__):
        raise RuntimeError("CUDA error: operation not supported")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    monkeypatch.setattr(torch, "zeros", fail)
    memory = SharedMemory(pinned=True)
    tensors = [filled(memory, value)[0] for value in (1, 2)]
    assert [int(tensor[0]) for tensor in tensors] == [1, 2]
    assert caplog.text.count("can't be pinned (CUDA error 801)") == 1


@pytest.mark.gpu
def test_pinned_memory_is_copied_from_without_waiting():
    memory, device = SharedMemory(pinned=True), torch.device("cuda")
    tensor, _ = filled(memory, 3)
    assert memory.pinned and tensor.is_pinned()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copy = tensor.to(device, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (copy == 3).all()
