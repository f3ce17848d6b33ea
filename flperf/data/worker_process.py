"""The processes in which video is decoded: a server that forks workers, and what a worker does.

The server imports PyTorch and PyAV once, has no threads and never touches a GPU, so forking it is safe and takes
milliseconds. It runs `serve`, started by `flperf.data.workers`. A worker reads one clip at a time into shared memory,
in one thread.

Both end when the process that trains ends, however it does: the server sees its socket close, and the kernel kills the
workers with it. Until then they ignore signals that schedulers and terminals send to every process of a job, from the
start of the server on.
"""

import ctypes
import os
import pickle
import signal
import socket
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from flperf.data.dali_support import colour_correction, find_obstacle
from flperf.data.prepared import remaining_preprocessing
from flperf.data.pyav import in_order, opened, write_frames
from flperf.data.resizing import compiled_kernel
from flperf.data.shared_memory import map_block
from flperf.data.unreadable import BadClip, shortage
from flperf.data.video_file import VideoFile
from flperf.data.worker_messages import MESSAGE_BYTES, Answer, Reading, Task
from flperf.errors import UserError

PR_SET_PDEATHSIG = 1  # prctl(2)


def serve(descriptor: int) -> None:
    """Fork a worker for each message on a socket, until its other end closes; see `Server` of `flperf.data.workers`."""
    torch.set_num_threads(1)
    compiled_kernel()  # before there are workers, which share it
    server, ended = socket.socket(fileno=descriptor), dict[int, int]()
    while True:
        message, descriptors, *_ = socket.recv_fds(server, MESSAGE_BYTES, 2)
        if not message:
            return
        _collect(ended)
        if not descriptors:  # a worker has died: why?
            server.send(pickle.dumps(_status(pickle.loads(message), ended)))
            continue
        worker = os.fork()
        if worker == 0:
            server.close()
            work(Connection(descriptors[0]), descriptors[1], message)
            os._exit(0)
        for duplicate in descriptors:
            os.close(duplicate)
        server.send(pickle.dumps(worker))


def _collect(ended: dict[int, int]) -> None:
    """Add the workers that have ended, and how (`os.waitstatus_to_exitcode`), so that none stays a zombie."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])


def _status(worker: int, ended: dict[int, int]) -> int | None:
    """How a worker ended; None if it has not within a second."""
    for _ in range(100):
        if worker in ended:
            return ended[worker]
        time.sleep(0.01)
        _collect(ended)
    return None


def work(connection: Connection, memory: int, message: bytes) -> None:
    """Read clips until the other end of the connection closes. An answer is an `Answer`, or an exception."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        reading = pickle.loads(message)
        os.sched_setaffinity(0, reading.cores or os.sched_getaffinity(0))
        blocks: dict[int, Tensor] = {}
        while True:
            task = connection.recv()
            if task.place.block not in blocks:
                blocks[task.place.block] = map_block(memory, task.place)
            size = torch.Size(reading.shape).numel()
            slot = blocks[task.place.block][task.place.offset : task.place.offset + size].view(reading.shape)
            connection.send(_answer(reading, task, slot))
    except (EOFError, ConnectionError):
        return


def _answer(reading: Reading, task: Task, slot: Tensor) -> Answer | Exception:
    started = time.process_time()
    try:
        with opened(task.path) as file:
            answer = in_order(file, lambda: read_clip(reading, task, file, slot))
    except (BadClip, UserError) as error:
        return error
    except Exception:
        return RuntimeError(f"reading {task.path} failed:\n{traceback.format_exc()}")
    answer.seconds = time.process_time() - started
    return answer


def read_clip(reading: Reading, task: Task, file: VideoFile, slot: Tensor) -> Answer:
    """Decode a clip into `slot`, or leave it to DALI."""
    times = file.timeline.times
    reasons = shortage(file.path, reading.frame_sampling, times)
    indices = reading.frame_sampling.frames(times, task.uniform)
    preprocessing = remaining_preprocessing(reading.preprocessing, file)
    obstacle = find_obstacle(file, reading.device, reusing=reading.reusing) if task.with_dali else None
    if task.with_dali and obstacle is None:
        return Answer(reasons, indices, preprocessing, colour_correction(file))
    write_frames(file, indices, slot, preprocessing)
    return Answer(reasons, obstacle=obstacle)
