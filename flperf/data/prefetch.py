"""Copies of the next batch to the device while the current one is used."""

from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import torch

from flperf.data.samplers import Batches, ClipBatch


def prefetch_to_device(batches: Batches, device: torch.device) -> Batches:
    """The same batches with `video` or `latents` on the device. A batch is valid until the next one is asked for: on a
    CPU its memory is then released. Closing this iterator closes `batches`."""
    with closing(batches):
        if device.type == "cuda":
            yield from _copied_ahead(batches, device)
        else:
            for batch in batches:
                yield batch
                batch.release()


def _copied_ahead(batches: Batches, device: torch.device) -> Batches:
    stream = torch.cuda.Stream(device)
    copies = (_copy(batch, device, stream) for batch in batches)
    current = next(copies, None)
    while current is not None:
        following = next(copies, None)
        yield _arrived(current)
        current.event.synchronize()  # it has passed long ago: the step after it has been launched
        current.source.release()
        current = following


class _Copy(NamedTuple):
    source: ClipBatch
    batch: ClipBatch  # on the device once the event has passed
    event: torch.cuda.Event


def _copy(batch: ClipBatch, device: torch.device, stream: torch.cuda.Stream) -> _Copy:
    """Start to copy, all in one piece."""
    found = {name: getattr(batch, name) for name in ("video", "latents") if getattr(batch, name) is not None}
    with torch.cuda.stream(stream):
        copied = {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}
        return _Copy(batch, replace(batch, **copied, on_release=None), stream.record_event())


def _arrived(copy: _Copy) -> ClipBatch:
    """Have the current stream wait for the copy, and the copy's memory kept until that stream is done with it."""
    computing = torch.cuda.current_stream()
    computing.wait_event(copy.event)
    for tensor in (copy.batch.video, copy.batch.latents):
        if tensor is not None:
            tensor.record_stream(computing)
    return copy.batch
