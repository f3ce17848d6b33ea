"""Memory for batches that worker processes write and this process reads."""

import logging
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flperf.errors import UserError

logger = logging.getLogger(__name__)

PORTABLE = 1  # pinned for all devices (cudaHostRegisterPortable)


class Place(NamedTuple):
    """Where a slot of a batch lies in the shared memory, in bytes."""

    block: int
    block_bytes: int
    offset: int  # in the block


class SharedMemory:
    """A file in memory that has no name, `descriptor`, and grows by blocks of equal size. It needs no space in
    /dev/shm.

    A block is used again once the batch in it is released or dropped. Every block is mapped once and, if `pinned`,
    registered with CUDA once, which takes longer than a copy from it.
    """

    def __init__(self, pinned: bool):
        self.descriptor = os.memfd_create("flperf batches", os.MFD_CLOEXEC)
        self.pinned, self.lock = pinned, threading.Lock()
        self.blocks: list[tuple[int, mmap.mmap]] = []  # (address, mapping); block i begins at i * its size
        self.free: list[int] = []
        self.registered: list[int] = []  # addresses
        weakref.finalize(self, _forget, self.descriptor, self.registered)

    def take(self, size: int) -> tuple[Tensor, Callable[[], object]]:
        """`size` bytes with arbitrary content, uint8; and what gives them back, which happens by itself when the last
        tensor over them is gone. `size` is the same at every call."""
        with self.lock:
            number = self.free.pop() if self.free else self._grow(size)
        array = np.frombuffer(self.blocks[number][1], np.uint8, size)
        return torch.from_numpy(array), weakref.finalize(array, self.free.append, number)

    def _grow(self, size: int) -> int:
        number, length = len(self.blocks), -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            os.posix_fallocate(self.descriptor, number * length, length)  # else writing could end in a bus error
            mapping = mmap.mmap(self.descriptor, length, offset=number * length)
        except OSError as error:
            raise UserError(
                f"no memory for a batch of {size / 1e6:.0f} MB ({error.strerror}); lower trainer.micro_batch_size or "
                "dataset.prefetch"
            ) from None
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        if self.pinned:
            self._register(address, length)
        self.blocks.append((address, mapping))
        return number

    def _register(self, address: int, length: int) -> None:
        status = int(torch.cuda.cudart().cudaHostRegister(address, length, PORTABLE))
        if not status:
            self.registered.append(address)
            return
        self.pinned = False
        logger.warning("memory for batches can't be pinned (CUDA error %d); copies to the GPU are slower", status)
        with suppress(RuntimeError):  # CUDA keeps the error for the next call that asks, which would fail for it
            torch.zeros(1, device="cuda")

    def place(self, slot: Tensor) -> Place:
        """Where a part of a tensor of `take` lies."""
        for number, (address, mapping) in enumerate(self.blocks):
            if 0 <= (offset := slot.data_ptr() - address) < len(mapping):
                return Place(number * len(mapping), len(mapping), offset)
        raise ValueError("the tensor is not in the shared memory")


def map_block(descriptor: int, place: Place) -> Tensor:
    """The block of a place as uint8, in another process that has the descriptor."""
    return torch.frombuffer(mmap.mmap(descriptor, place.block_bytes, offset=place.block), dtype=torch.uint8)


def _forget(descriptor: int, registered: list[int]) -> None:
    os.close(descriptor)
    if registered:
        torch.cuda.synchronize()  # a copy may still read it
    for address in registered:
        torch.cuda.cudart().cudaHostUnregister(address)
