"""Stops a run at the end of a step when a scheduler sends a signal, so that no work is lost and the job is requeued.

Schedulers send SIGTERM or SIGUSR1, and may not send it to every process, or not at the same time. The processes
therefore vote. After every step an all-reduce of a 4-byte flag starts on the device; its result is read after the next
step, when it has long arrived. All processes stop after the same step, no step waits for the host, and one signalled
process is enough.
"""

import os
import signal

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []  # global because signal handlers are


class Preempted(SystemExit):
    """Raised on all processes after the same step, with a checkpoint written. The exit status is 75 (`EX_TEMPFAIL`: try
    again later)."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


def catch_stop_signals() -> None:
    """Record stop signals from now on, instead of ending the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: _received.append(received))


class PreemptionVote:
    """Tells all processes at the same step whether any of them has received a stop signal."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.ballot = torch.zeros((), device=device)
        self.result = torch.zeros((), pin_memory=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None

    def passed(self) -> bool:
        """The result of the vote that the previous call started (False in the first call); starts the next vote. A
        collective that does not wait for the device."""
        if self.arrived:
            self.arrived.synchronize()  # of the copy that the previous step started
        outcome = bool(self.result)
        self.ballot.fill_(bool(_received))
        dist.all_reduce(self.ballot, op=dist.ReduceOp.MAX)
        self.result.copy_(self.ballot, non_blocking=True)
        if self.arrived:
            self.arrived.record()
        return outcome
