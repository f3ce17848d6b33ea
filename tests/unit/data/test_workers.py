"""Reading in worker processes: the clips of PyAV's reader, and workers that are killed, fail, hang or lose the process
that they work for."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch
from odd_videos import add_stream

from flperf.config import Backbone
from flperf.data import workers
from flperf.data.loader import load_batches
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import PyAVReader
from flperf.data.samplers import BatchShare, FrameSampling, TrainingSampler, ValidationSampler
from flperf.data.worker_messages import Reading
from flperf.data.workers import WorkerReader, start_server
from flperf.errors import UserError

CPU = torch.device("cpu")
SAMPLING, PREPROCESSING = FrameSampling(4, 3, "center"), Preprocessing.of(Backbone(architecture={"crop_size": 48}))
NAMES = ["h264.mp4", "missing.mp4", "vp9.webm", "mpeg4.avi", "hevc.mp4"]


def load(reader, threads=2, batch_size=4):
    sampler = TrainingSampler(len(reader.paths), 0)
    requests = sampler.batches(0, BatchShare(0, 1, batch_size, batch_size))
    return load_batches(reader, requests, sampler, [0] * len(reader.paths), threads, 2, CPU)


def validate(reader):
    sampler = ValidationSampler(len(reader.paths))
    requests = sampler.batches(BatchShare(0, 1, 2, 2), 2)
    return load_batches(reader, requests, sampler, [0] * sampler.size, 1, 1, CPU)


def worker_reader(paths, preprocessing=PREPROCESSING, frame_sampling=SAMPLING):
    return WorkerReader([str(path) for path in paths], Reading(frame_sampling, preprocessing), CPU)


def slow_reader(path):
    return worker_reader([path], frame_sampling=FrameSampling(3000, 1, "first"))


def children():
    return [child for child in psutil.Process(start_server().process.pid).children() if alive(child)]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A file of so many frames that decoding all of them takes a second."""
    path = tmp_path_factory.mktemp("slow") / "slow.avi"
    with av.open(str(path), "w") as container:
        stream = add_stream(container, "mpeg4", {}, (64, 64))
        for index in range(3000):
            picture = np.full((64, 64, 3), index % 200, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def test_clips_and_refusals_are_those_of_pyav(videos):
    paths = [videos / name for name in NAMES]
    ours, reference = (
        load(worker_reader(paths)),
        load(PyAVReader([str(path) for path in paths], SAMPLING, PREPROCESSING)),
    )
    for _ in range(8):
        a, b = next(ours), next(reference)
        assert torch.equal(a.video, b.video) and torch.equal(a.clip, b.clip) and a.skipped == b.skipped
        a.release()
    ours.close()


def test_a_killed_worker_is_replaced_and_loses_no_clip(videos, caplog):
    """As when the kernel ends a process because memory ran out."""
    paths = [str(videos / "h264.mp4"), str(videos / "vp9.webm")]
    batches, reference = load(worker_reader(paths)), load(PyAVReader(paths, SAMPLING, PREPROCESSING))
    for number in range(12):
        a, b = next(batches), next(reference)
        assert torch.equal(a.video, b.video) and torch.equal(a.clip, b.clip) and not a.skipped
        if number in (2, 5):
            for child in children():
                child.kill()
    batches.close()
    assert "ended with signal 9 (Killed)" in caplog.text


def test_the_server_is_started_again(videos):
    batches = load(worker_reader([videos / "h264.mp4"]))
    next(batches)
    start_server().process.kill()
    for _ in range(6):
        assert not next(batches).skipped
    batches.close()


def test_a_server_that_is_killed_as_it_is_asked_for_a_worker_is_started_again(videos):
    server = start_server().process
    server.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, server.kill).start()
    batches = load(worker_reader([videos / "h264.mp4"]))
    assert not next(batches).skipped and start_server().process is not server
    batches.close()


def test_signals_to_the_whole_job_do_not_end_a_server_that_starts(videos):
    server = workers.Server()
    maps = Path(f"/proc/{server.process.pid}/maps")
    wait_until(lambda: "torch" in maps.read_text())  # it is being imported
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        server.process.send_signal(number)
    reader = worker_reader([videos / "h264.mp4"])
    assert server.fork(reader.reading, reader.memory.descriptor).process > 0
    server.close()


def test_a_clip_that_kills_its_worker_twice_is_unreadable(slow, caplog):
    before, killed = set(children()), set()

    def kill():
        while len(killed) < 2:
            wait_until(lambda: set(children()) - before - killed)
            (child,) = set(children()) - before - killed
            child.kill()
            killed.add(child)

    thread = threading.Thread(target=kill)
    thread.start()
    with pytest.raises(UserError, match=r"can't be read: .*slow.avi: the process that decoded it ended with signal 9"):
        list(validate(slow_reader(slow)))
    thread.join()
    assert caplog.text.count("signal 9") == 3  # each death, and the clip


def test_a_clip_on_which_its_worker_hangs_is_unreadable(slow, monkeypatch):
    """As on a network drive that does not answer."""
    monkeypatch.setattr(workers, "CLIP_SECONDS", 1.0)
    before, stream = set(children()), validate(slow_reader(slow))

    def stop():
        wait_until(lambda: set(children()) - before)
        for child in set(children()) - before:
            child.suspend()

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(UserError, match="can't be read: .*slow.avi: decoding gave no frames within 1 s"):
        list(stream)
    thread.join()
    wait_until(lambda: not set(children()) - before)


def test_a_fault_of_ours_ends_the_run_with_its_traceback(videos):
    broken = worker_reader([videos / "h264.mp4"], replace(PREPROCESSING, resize="wide"))
    with pytest.raises(RuntimeError, match=r"(?s)reading .*h264.mp4 failed.*Traceback"):
        next(load(broken))


def test_where_no_process_can_be_started_one_line_says_so(videos, monkeypatch):
    def fail(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.Server, "fork", fail)
    with pytest.raises(UserError, match="no process for decoding can be started: .*temporarily unavailable"):
        next(load(worker_reader([videos / "h264.mp4"])))


def test_a_forked_process_has_a_server_of_its_own(videos):
    """As the workers of a DataLoader would."""
    server = start_server()
    child = os.fork()
    if child == 0:
        ours = next(load(worker_reader([videos / "h264.mp4"]))).skipped == [] and start_server() is not server
        start_server().close()
        os._exit(0 if ours else 1)
    batches = load(worker_reader([videos / "h264.mp4"]))
    assert not next(batches).skipped and start_server() is server
    batches.close()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("how", ["close", "drop"])
def test_workers_end_with_the_batches(videos, how, caplog):
    before = set(children())
    batches = load(worker_reader([videos / "h264.mp4"]))
    next(batches)
    mine = set(children()) - before
    assert mine
    with caplog.at_level(logging.WARNING):
        if how == "close":
            batches.close()
        del batches
        wait_until(lambda: not [child for child in mine if alive(child)])
    assert not caplog.records


def test_closing_does_not_wait_for_the_clips_that_are_read(slow):
    reader = slow_reader(slow)
    stream = load(reader, threads=1, batch_size=1)
    waiting = threading.Thread(target=lambda: pytest.raises(CancelledError, next, stream), daemon=True)
    waiting.start()
    wait_until(lambda: len(reader.workers))
    reader.close()
    waiting.join(10)
    assert not waiting.is_alive()


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


SCRIPT = """
import sys, time
sys.path[:] = sys.argv[2:]
from test_workers import *
batches = load(worker_reader([sys.argv[1]]))
next(batches)
print(start_server().process.pid, *(child.pid for child in children()), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_trains(videos, number):
    command = [sys.executable, "-c", SCRIPT, str(videos / "h264.mp4"), str(Path(__file__).parent), *sys.path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        started = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(started) >= 2
        for one in started:
            one.send_signal(signal.SIGTERM)  # a scheduler sends it to every process; these go on
        time.sleep(0.2)
        assert all(map(alive, started))
        process.send_signal(number)
        process.wait(10)
        wait_until(lambda: not any(map(alive, started)))
