"""Stop a run at the end of a step when a scheduler asks for it, so that it loses nothing and is queued again.

Schedulers send SIGTERM or SIGUSR1, and not to every process at once. The processes therefore vote: the flag is
all-reduced on the device after every step (4 bytes) and read one step later, when it has long arrived. So all of them
leave after the same step, no step waits for the host, and one signalled process is enough.
"""

import os
import signal

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []  # a process has one handler a signal, hence one list


class Preempted(SystemExit):
    """Raised on all processes after the same step, with everything saved; exit status 75 (`EX_TEMPFAIL`: try again
    later)."""

    def __init__(self) -> None:
        super().__init__(os.EX_TEMPFAIL)


def catch_stop_signals() -> None:
    """From now on the stop signals are remembered instead of ending the process."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, _: _received.append(received))


class PreemptionVote:
    """Whether any process has been asked to stop, known to all of them at the same step."""

    def __init__(self, device: torch.device):
        on_gpu = device.type == "cuda"
        self.ballot = torch.zeros((), device=device)
        self.result = torch.zeros((), pin_memory=on_gpu)
        self.arrived = torch.cuda.Event() if on_gpu else None

    def passed(self) -> bool:
        """The outcome of the vote that the last call began (False at first); begins the next. A collective, without a
        host wait."""
        if self.arrived:
            self.arrived.synchronize()  # the copy of a whole step ago
        outcome = bool(self.result)
        self.ballot.fill_(bool(_received))
        dist.all_reduce(self.ballot, op=dist.ReduceOp.MAX)
        self.result.copy_(self.ballot, non_blocking=True)
        if self.arrived:
            self.arrived.record()
        return outcome
