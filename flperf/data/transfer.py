"""Batches copied to the device one ahead: while a GPU computes on one, the next one is on its way.

The copy has a stream of its own; on the stream that computes it would wait for the step before it and hold up the one after it. Only what
comes from host memory is copied (cached latents, PyAV's frames): DALI and the drawn clips make their batches on the device.
"""

from contextlib import closing
from dataclasses import replace

import torch

from flperf.data.samplers import Batches, ClipBatch


def copied_ahead(batches: Batches, device: torch.device) -> Batches:
    """The same batches with `video` or `latents` on the device; on a CPU they pass as they are. Closing it closes `batches`."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)
    with closing(batches):
        copies = (_copy(batch, device, stream) for batch in batches)
        current = next(copies, None)
        while current is not None:
            following = next(copies, None)
            yield _arrived(*current)
            current = following


def _copy(batch: ClipBatch, device: torch.device, stream: torch.cuda.Stream) -> tuple[ClipBatch, torch.cuda.Event]:
    """Begin to copy: the batch as it will be, and the event after which it is."""
    found = {name: getattr(batch, name) for name in ("video", "latents") if getattr(batch, name) is not None}
    with torch.cuda.stream(stream):
        copied = {name: tensor.to(device, non_blocking=True) for name, tensor in found.items()}
        return replace(batch, **copied), stream.record_event()


def _arrived(batch: ClipBatch, event: torch.cuda.Event) -> ClipBatch:
    """Have the stream that computes wait for the copy, and the copy's memory stay until that stream is done with it."""
    computing = torch.cuda.current_stream()
    computing.wait_event(event)
    for tensor in (batch.video, batch.latents):
        if tensor is not None:
            tensor.record_stream(computing)
    return batch
