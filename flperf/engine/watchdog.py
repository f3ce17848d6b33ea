"""Detects processes that died or are unreachable, and ends the others with an error that names them.

A failed process leaves the others waiting in a collective. That fails only after its timeout, and on a GPU the host
does not even wait for it. Every process therefore sends heartbeats from a thread, through a TCP store at rank 0. Rank 0
reads all heartbeats and publishes failures; the others read rank 0's heartbeat and the published failure. The traffic
is linear in the number of processes.
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

MISSED_HEARTBEATS = 5  # in a row; a process that misses more has failed
FAILURE = "failure"  # the key under which a failure is published


class Watchdog:
    """A context manager in which processes watch each other. A process that is silent for a tenth of `timeout`
    (seconds) has failed: the others name it on stderr and exit with status 1. An exception on one process ends the
    others with its text.

    Silence is counted in ticks of a local thread, not in wall time. A process that was itself suspended, or whose
    interpreter was locked, therefore does not take the others for failed when it continues.
    """

    def __init__(self, process: Process, timeout: float):
        self.rank, self.world_size = process.rank, process.world_size
        self.interval = timeout / 10 / MISSED_HEARTBEATS
        self.closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self.world_size == 1:
            return self
        self.peers: list = [None] * self.world_size
        dist.all_gather_object(self.peers, (self.rank, socket.gethostname(), os.getpid()))
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        # Under torchrun the store outlives the processes. The prefix separates the keys of this start from old ones.
        self.store = dist.PrefixStore(self._name(0), store)
        self.store.set(str(self.rank), "0")
        if self.rank == 0:
            self.store.set(FAILURE, "")
        dist.barrier()
        self.missed = dict.fromkeys(range(1, self.world_size) if self.rank == 0 else [0], 0)
        for work in (self._exchange_heartbeats, self._count_missed):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if self.world_size == 1:
            return
        if error is None or isinstance(error, Preempted):
            dist.barrier()  # a launcher ends the others as soon as one exits with a status above 0
        else:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                self._wait_for_failed_peer()
            if self.rank != 0:  # the store ends with rank 0
                first_line = next(iter(str(error).splitlines()), "")
                self.store.set(FAILURE, f"{self._name(self.rank)} ended: {type(error).__name__}: {first_line}")
        self.closed.set()

    def _exchange_heartbeats(self) -> None:
        """Send heartbeats and read those of others. A dead connection can block this thread for minutes;
        `_count_missed` therefore runs in another."""
        seen: dict[int, bytes] = {}
        for count in itertools.count(1):
            if self.closed.wait(self.interval):
                return
            try:
                self.store.set(str(self.rank), str(count))
                *heartbeats, failure = self.store.multi_get([*map(str, self.missed), FAILURE])
            except dist.DistError:
                return  # rank 0 is silent from now on
            if failure:
                self._exit(failure.decode())
            for rank, heartbeat in zip(self.missed, heartbeats, strict=True):
                if heartbeat != seen.get(rank):
                    seen[rank], self.missed[rank] = heartbeat, 0

    def _count_missed(self) -> None:
        while not self.closed.wait(self.interval):
            for rank in self.missed:
                self.missed[rank] += 1
            silent = [rank for rank, missed in self.missed.items() if missed > MISSED_HEARTBEATS]
            if silent:
                self._fail(silent, f"not heard from for {MISSED_HEARTBEATS * self.interval:.0f} s")

    def _wait_for_failed_peer(self) -> None:
        """After a failed collective, find the process that caused it: at once on this host, on another host when it has
        been silent for long enough."""
        host = self.peers[self.rank][1]
        local = [(rank, process) for rank, name, process in self.peers if name == host]
        for _ in range(2 * MISSED_HEARTBEATS * 10):
            dead = [rank for rank, process in local if not _is_running(process)]
            if dead:
                self._fail(dead, "died")
            time.sleep(self.interval / 10)

    def _fail(self, ranks: list[int], reason: str) -> NoReturn:
        """Publish the failure, then exit."""
        failure = f"{', '.join(map(self._name, ranks))} {reason}"
        if 0 not in ranks:
            self.store.set(FAILURE, failure)
        if self.rank == 0:
            time.sleep(2 * self.interval)  # let the others read it: the store may end with this process
        self._exit(failure)

    def _exit(self, failure: str) -> NoReturn:
        """End this process from a thread. An exception would not reach the main thread, which may wait in a collective
        for ever."""
        resume = "the next start resumes from the last checkpoint"
        print(f"flperf: {self._name(self.rank)} ends: {failure}; {resume}", file=sys.stderr, flush=True)
        os._exit(1)

    def _name(self, rank: int) -> str:
        _, host, process = self.peers[rank]
        return f"rank {rank} (host {host}, process {process})"


def _is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
