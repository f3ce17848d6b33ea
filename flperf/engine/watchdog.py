"""Notice a process that died or can't be reached, and end the others with its name instead of letting them hang.

A collective only says that someone is missing, after its timeout, and on a GPU the host waits for the device, not for
the collective. So every process beats through the TCP store in which all of them met, from a thread that neither
holds up. Rank 0 reads the beats and publishes who was lost; the others read rank 0's beat and what it published, so
that traffic grows linearly with processes.
"""

import itertools
import os
import socket
import sys
import threading
import time
from typing import NoReturn

import psutil
import torch.distributed as dist

from flperf.engine.preemption import Preempted
from flperf.engine.process import Process

BEATS = 5  # in the time after which a silent process counts as lost
LOST = "lost"  # the key under which rank 0 publishes


class Watchdog:
    """A context in which processes watch each other. One that is silent for a tenth of `timeout` (seconds) is lost,
    and so is the run: the others name it on stderr and exit with status 1. An exception on one process ends the
    others with its text.

    Silence is counted in ticks of a clock thread of our own, not in wall time: a process that was itself suspended, or
    whose interpreter was locked, does not take the others for dead when it wakes.
    """

    def __init__(self, process: Process, timeout: float):
        self.rank, self.world_size = process.rank, process.world_size
        self.interval = timeout / 10 / BEATS
        self.left = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.world_size == 1:
            return self
        self.peers: list = [None] * self.world_size
        dist.all_gather_object(self.peers, (self.rank, socket.gethostname(), os.getpid()))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        # Under torchrun the store outlives a restart of the processes: a prefix of this start's own keeps old keys
        # apart.
        self.store = dist.PrefixStore(self._name(0), store)
        self.store.set(str(self.rank), "0")
        if self.rank == 0:
            self.store.set(LOST, "")
        dist.barrier()
        self.silent_ticks = dict.fromkeys(range(1, self.world_size) if self.rank == 0 else [0], 0)
        for work in (self._beat, self._count):
            threading.Thread(target=work, name=f"peers{work.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.world_size == 1:
            return
        if error is None or isinstance(error, Preempted):
            dist.barrier()  # a launcher ends the others as soon as one has left with an exit status
        else:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                self._wait_for_the_cause()
            if self.rank != 0:  # rank 0 takes the store along
                first_line = next(iter(str(error).splitlines()), "")
                self.store.set(LOST, f"{self._name(self.rank)} ended: {type(error).__name__}: {first_line}")
        self.left.set()

    def _beat(self) -> None:
        """Send beats and read others'. May hang in a dead connection for minutes, which is why another thread
        counts."""
        seen = {}
        for count in itertools.count(1):
            if self.left.wait(self.interval):
                return
            try:
                self.store.set(str(self.rank), str(count))
                *beats, lost = self.store.multi_get([*map(str, self.silent_ticks), LOST])
            except dist.DistError:
                return  # rank 0 falls silent
            if lost:
                self._end(lost.decode())
            for rank, beat in zip(self.silent_ticks, beats, strict=True):
                if beat != seen.get(rank):
                    seen[rank], self.silent_ticks[rank] = beat, 0

    def _count(self) -> None:
        while not self.left.wait(self.interval):
            for rank in self.silent_ticks:
                self.silent_ticks[rank] += 1
            silent = [rank for rank, ticks in self.silent_ticks.items() if ticks > BEATS]
            if silent:
                self._lose(silent, f"not heard from for {BEATS * self.interval:.0f} s")

    def _wait_for_the_cause(self) -> None:
        """After a failed collective: a dead process of this host is seen at once, one of another host when it falls
        silent."""
        host = self.peers[self.rank][1]
        here = [(rank, process) for rank, name, process in self.peers if name == host]
        for _ in range(2 * BEATS * 10):
            gone = [rank for rank, process in here if not _runs(process)]
            if gone:
                self._lose(gone, "died")
            time.sleep(self.interval / 10)

    def _lose(self, ranks: list[int], how: str) -> NoReturn:
        """Tell the others, then end."""
        text = f"{', '.join(map(self._name, ranks))} {how}"
        if 0 not in ranks:
            self.store.set(LOST, text)
        if self.rank == 0:
            time.sleep(2 * self.interval)  # the store may live in this very process
        self._end(text)

    def _end(self, text: str) -> NoReturn:
        """Threads can't raise in the main one, which may never return from its collective."""
        resume = "the next start resumes from the last checkpoint"
        print(f"flperf: {self._name(self.rank)} ends: {text}; {resume}", file=sys.stderr, flush=True)
        os._exit(1)

    def _name(self, rank: int) -> str:
        _, host, process = self.peers[rank]
        return f"rank {rank} (host {host}, process {process})"


def _runs(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
