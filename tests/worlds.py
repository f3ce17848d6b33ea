"""Groups of processes, forked from one parent that has done the imports: eight seconds of CPU in a cold process.

`flperf` runs a command as the launcher would start it, `python` a program, `run_world` a function on every rank.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from runs import ROOT, free_port

from flperf import cli

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preload"])
GRACE = 10  # seconds for the other ranks to end after one of them failed


class World:
    """Starts `function(*arguments)` on every rank of a group of `processes`; if None, in one process without a group.

    A context manager: processes that still run at its end are killed.
    """

    def __init__(self, processes: int | None, function: Callable, *arguments, cwd: Path | None = None, **environment):
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        with mock.patch.dict(os.environ, PYTHONPATH=path):
            forkserver.ensure_running()  # the first world starts the parent
        self._folder = TemporaryDirectory()
        for name in ("stdout", "stderr"):
            self._path(name).touch()
        self.members, port = [], free_port()
        for rank in range(processes or 1):
            variables = os.environ | _group(rank, processes, port) | environment
            work = (self._path(f"result_{rank}"), function, arguments)
            self.members.append(CONTEXT.Process(target=_run, args=(self._folder.name, cwd, variables, *work)))
            self.members[-1].start()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_) -> None:
        for member in self.members:
            member.kill()
        for member in self.members:
            member.join()
        self._folder.cleanup()

    def join(self, timeout: float = 300) -> list[int | None]:
        """The exit status of every rank, None if it still runs after `timeout` seconds, or `GRACE` seconds after
        another failed."""
        deadline = time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0 and (running := self._running()):
            wait([member.sentinel for member in running], timeout=left)
            if any(member.exitcode for member in self.members):
                deadline = min(deadline, time.monotonic() + GRACE)
        return [member.exitcode for member in self.members]

    def result(self, rank: int):
        """What the function returned on a rank."""
        return pickle.loads(self._path(f"result_{rank}").read_bytes())

    @property
    def stdout(self) -> str:
        """Of all ranks, so far."""
        return self._path("stdout").read_text()

    @property
    def stderr(self) -> str:
        return self._path("stderr").read_text()

    def _running(self) -> list:
        return [member for member in self.members if member.exitcode is None]

    def _path(self, name: str) -> Path:
        return Path(self._folder.name, name)


def run_world(processes: int, function: Callable, *arguments, **environment: str) -> list:
    """What `function(*arguments)` returned on each rank; it must be importable by its name."""
    with World(processes, function, *arguments, **environment) as world:
        statuses = world.join()
        output = world.stdout[-4000:] + world.stderr[-4000:]
        assert statuses == [0] * processes, f"{function.__name__} ended with {statuses}\n{output}"
        return [world.result(rank) for rank in range(processes)]


def flperf(
    *arguments: str, processes: int | None = None, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """`flperf COMMAND …` in one process, or on each of several that form a group."""
    return _finish(arguments, World(processes, command, *arguments, cwd=cwd, **environment))


def python(program: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """`python -c PROGRAM`."""
    return _finish((program,), World(None, execute, program, cwd=cwd, **environment))


def command(*arguments: str) -> None:
    sys.argv = ["flperf", *arguments]
    cli.main()


def execute(program: str) -> None:
    exec(program, {"__name__": "__main__"})


def _finish(arguments: Sequence[str], world: World) -> subprocess.CompletedProcess:
    with world:
        statuses = world.join()
        status = next((status for status in statuses if status != 0), 0)
        return subprocess.CompletedProcess(arguments, status, world.stdout, world.stderr)


def _group(rank: int, processes: int | None, port: int) -> dict[str, str]:
    """What a launcher puts into the environment. The local size gives each process one thread, which is fastest for
    small heads."""
    variables = {"LOCAL_SIZE": os.cpu_count()}
    if processes:
        variables |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in variables.items()}


def _run(folder: str, cwd: Path | None, environment: dict[str, str], result: Path, function: Callable, arguments):
    for name in ("stdout", "stderr"):
        stream, file = getattr(sys, name), os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, stream.fileno())
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if cwd:
        os.chdir(cwd)
    result.write_bytes(pickle.dumps(function(*arguments)))
