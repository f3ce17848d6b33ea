"""Reading of video in worker processes.

Decoding in threads of the process that trains would share its interpreter with the step, and the parts of a clip that
hold the interpreter's lock would bound the rate however many cores there are. So each reading thread has a process of
its own, which writes clips into shared memory; the thread only waits for its answer.

A worker that dies, as at the hand of the kernel when memory runs out, is replaced, and its clip is read again. A clip
that kills its worker twice, or on which one hangs, counts as unreadable.
"""

import atexit
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import CancelledError
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from flperf.data.loader import Reader
from flperf.data.samplers import ClipRequest
from flperf.data.shared_memory import SharedMemory
from flperf.data.unreadable import BadClip, Reasons
from flperf.data.worker_messages import MESSAGE_BYTES, Answer, Reading, Task
from flperf.errors import UserError

logger = logging.getLogger(__name__)

CLIP_SECONDS = 300.0  # within which a worker answers; a clip takes a tenth of a second
# Signals that schedulers and terminals send to every process of a job. Importing takes seconds, so they are ignored
# before.
IGNORED = [int(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)]
START = """
import sys
sys.path[:] = {path!r}
import signal
for number in {ignored}:
    signal.signal(number, signal.SIG_IGN)
import flperf.data.worker_process
flperf.data.worker_process.serve({descriptor})
"""


class WorkerDied(Exception):
    """A worker ended; the text says how."""


class WorkerHangs(Exception):
    """A worker gave no answer in time, and was killed."""


class Server:
    """The process that forks workers; see `flperf.data.worker_process`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START.format(path=sys.path, ignored=IGNORED, descriptor=other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            )
        atexit.register(self.close)

    def fork(self, reading: Reading, memory: int) -> "Worker":
        """A new worker that writes into the memory of this descriptor. Raises `OSError` if the server has ended."""
        ours, theirs = socket.socketpair()
        with ours, theirs, self.lock:
            socket.send_fds(self.socket, [pickle.dumps(reading)], [theirs.fileno(), memory])
            return Worker(self, self._answer(), Connection(ours.detach()))

    def status(self, process: int) -> str:
        """How a worker ended."""
        with self.lock:
            self.socket.send(pickle.dumps(process))
            code = self._answer()
        if code is None:
            return "no exit status"
        return f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit status {code}"

    def _answer(self) -> Any:
        message = self.socket.recv(MESSAGE_BYTES)
        if not message:
            raise ConnectionError("the process that starts workers has ended")
        return pickle.loads(message)

    def close(self) -> None:
        """End the server, and with it its workers."""
        atexit.unregister(self.close)
        self.socket.close()
        self.process.wait()


class Worker:
    """A worker process, used by one thread."""

    def __init__(self, server: Server, process: int, connection: Connection):
        self.server, self.process, self.connection = server, process, connection
        self.closed = False

    def ask(self, task: Task) -> Answer:
        """Have a clip read. Raises what reading it raised, and `WorkerDied`."""
        try:
            self.connection.send(task)
            if not self.connection.poll(CLIP_SECONDS):
                os.kill(self.process, signal.SIGKILL)
                raise WorkerHangs(f"decoding gave no frames within {CLIP_SECONDS:.0f} s")
            answer = self.connection.recv()
        except (EOFError, ConnectionError):
            raise WorkerDied(f"the process that decoded it ended with {self._status()}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _status(self) -> str:
        try:
            return "its work" if self.closed else self.server.status(self.process)
        except OSError:
            return "the process that started it"

    def close(self) -> None:
        """Let the worker end, and a thread that waits for it go on."""
        self.closed = True
        with socket.socket(fileno=os.dup(self.connection.fileno())) as duplicate:
            duplicate.shutdown(socket.SHUT_RDWR)


_server: Server | None = None
_server_lock = threading.Lock()


def start_server() -> Server:
    """The server of this process. It is started at the first call, and again if it has ended; it takes some seconds,
    which do not hold up the caller."""
    global _server
    with _server_lock:
        if _server is None or _server.process.poll() is not None:
            _server = Server()
        return _server


def _forget_server() -> None:
    """After a fork: the server is the parent's, and must not get messages from two processes."""
    global _server
    if _server is not None:
        atexit.unregister(_server.close)
        _server.socket.close()
        _server = None


os.register_at_fork(after_in_child=_forget_server)


class WorkerReader(Reader):
    """Reads clips of video files, uint8 `f h w c`, with PyAV, in a process for each thread that calls it."""

    def __init__(self, paths: list[str], reading: Reading, device: torch.device):
        self.paths, self.reading, self.shape = paths, reading, reading.shape
        self.memory = SharedMemory(pinned=device.type == "cuda")
        self.own = threading.local()  # of each thread: its worker
        self.workers: list[Worker] = []
        self.closed = False
        start_server()

    def read(self, request: ClipRequest, slot: Tensor) -> Reasons:
        return self.ask(request, slot).reasons

    def ask(self, request: ClipRequest, slot: Tensor, *, with_dali: bool = False) -> Answer:
        """Have this thread's worker read a clip into `slot`, a part of a tensor of `self.memory`."""
        task = Task(self.paths[request.clip], request.uniform, self.memory.place(slot), with_dali)
        deaths: list[str] = []
        while len(deaths) < 2 and not self.closed:
            try:
                return self._worker().ask(task)
            except WorkerHangs as error:
                del self.own.worker
                raise BadClip(task.path, str(error)) from None
            except WorkerDied as death:
                del self.own.worker
                deaths.append(str(death))
                if not self.closed:
                    logger.warning("%s: %s", task.path, death)
        if self.closed:
            raise CancelledError
        raise BadClip(task.path, deaths[-1])

    def _worker(self) -> Worker:
        if not hasattr(self.own, "worker"):
            self.own.worker = self._start_worker()
            self.workers.append(self.own.worker)
            if self.closed:  # by another thread, which has not seen this worker
                self.own.worker.close()
        return self.own.worker

    def _start_worker(self) -> Worker:
        """Raises `UserError` if the server ends three times: then it can't work here, and was not killed by chance."""
        try:
            for _ in range(2):
                server = start_server()
                with suppress(ConnectionError):
                    return server.fork(self.reading, self.memory.descriptor)
                server.process.wait()  # it has closed its socket, and may still be ending
            return start_server().fork(self.reading, self.memory.descriptor)
        except OSError as error:
            raise UserError(f"no process for decoding can be started: {error}") from None

    def close(self) -> None:
        self.closed = True
        for worker in list(self.workers):
            worker.close()
