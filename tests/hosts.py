"""Two hosts on this machine: two network namespaces joined by a veth pair, each with its own name, address and half
of the cores.

They are in a user namespace of their own, which needs no privileges where the kernel lets users create one.
"""

import contextlib
import os
import signal
import subprocess

import psutil

ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "eth0"  # on both; gloo can't find it by the host's name, which nothing resolves here


class NotPermitted(Exception):
    """Namespaces can't be created here; the text is the reason."""


class TwoHosts:
    """Context manager; entering it may raise `NotPermitted`. All processes left on the hosts at the end are killed."""

    def __enter__(self) -> "TwoHosts":
        self.sleepers: list[subprocess.Popen] = []  # one holds each namespace open
        self.networks: list[str] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.__exit__)
            self._boot(["unshare", "--user", "--map-root-user"])
            self._boot(
                ["nsenter", "--target", str(self.sleepers[0].pid), "--user", "--preserve-credentials", "unshare"]
            )
            self._do(0, f"ip link add {INTERFACE} type veth peer name {INTERFACE} netns {self.sleepers[1].pid}")
            for host, address in enumerate(ADDRESSES):
                self._do(host, f"ip address add {address}/24 dev {INTERFACE}")
                self._do(host, f"ip link set {INTERFACE} up")
            stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        for host, sleeper in enumerate(self.sleepers):
            for process in self.processes(host):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            sleeper.kill()
            sleeper.wait()

    def command(self, host: int, *command: str) -> list[str]:
        """The command that runs `command` on a host (0 or 1), with the same process id."""
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        own = ",".join(map(str, cores[:half] if host == 0 else cores[-half:]))
        enter = [
            "nsenter",
            "--target",
            str(self.sleepers[host].pid),
            "--user",
            "--net",
            "--uts",
            "--preserve-credentials",
        ]
        return [*enter, "taskset", "--cpu-list", own, *command]

    def processes(self, host: int) -> list[psutil.Process]:
        """All processes on a host."""
        sleeper, network = self.sleepers[host].pid, self.networks[host]
        return [
            process for process in psutil.process_iter() if process.pid != sleeper and _network(process.pid) == network
        ]

    def rank(self, rank: int) -> psutil.Process:
        """The training process of a rank; each host runs one."""
        for process in self.processes(rank):
            if process.environ().get("RANK") == str(rank) and any(
                part.endswith("train.py") for part in process.cmdline()
            ):
                return process
        raise AssertionError(f"rank {rank} does not run on host {rank}")

    def signal_all(self, number: signal.Signals, *hosts: int) -> None:
        """Signal launchers and training processes, as Slurm does with a step."""
        for process in [process for host in hosts for process in self.processes(host)]:
            process.send_signal(number)

    def cut(self) -> None:
        self._do(1, f"ip link set {INTERFACE} down")

    def restore(self) -> None:
        self._do(1, f"ip link set {INTERFACE} up")

    def _boot(self, unshare: list[str]) -> None:
        boot = f"hostname host-{len(self.sleepers)} && ip link set lo up && echo up && exec sleep infinity"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        try:
            sleeper = subprocess.Popen([*unshare, "--net", "--uts", "sh", "-c", boot], **pipes)
        except FileNotFoundError as missing:
            raise NotPermitted(str(missing)) from missing
        if sleeper.stdout.readline() != "up\n":
            raise NotPermitted(sleeper.communicate()[1].strip())
        self.sleepers.append(sleeper)
        self.networks.append(_network(sleeper.pid))

    def _do(self, host: int, command: str) -> None:
        done = subprocess.run(self.command(host, *command.split()), capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotPermitted(f"{command}: {done.stderr.strip()}")


def _network(process: int) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:  # it has ended, or belongs to another user
        return None
