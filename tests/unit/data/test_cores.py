"""The share of the machine's cores: affinity, a container's quota, NUMA nodes, and the cores that a step needs."""

import os

import pytest
import torch

from flperf.data import cores

EIGHT_GPUS = [f"0000:{bus:02x}:00.0" for bus in range(8)]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, 12),
        ({"WORLD_SIZE": "3"}, 4),
        ({"LOCAL_SIZE": "2", "WORLD_SIZE": "8"}, 6),
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, 3),
        ({"LOCAL_WORLD_SIZE": "99"}, 1),
    ],
)
def test_processes_of_a_machine_share_its_cores(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert cores.cores_per_process() == expected


def affinities(monkeypatch, own, parent):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(own) if process == 0 else set(parent))


def test_an_affinity_that_each_process_was_given_is_not_divided(monkeypatch):
    """`deepspeed --bind_cores_to_rank` binds each process to its share."""
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    monkeypatch.setenv("LOCAL_SIZE", "4")
    affinities(monkeypatch, range(8, 16), range(32))
    assert cores.cores_per_process() == 8
    affinities(monkeypatch, range(32), range(32))
    assert cores.cores_per_process() == 8
    affinities(monkeypatch, range(8), range(8))  # a container of eight cores
    assert cores.cores_per_process() == 2


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "350000 100000"}, 3.5),
        ({"job/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2.0),
        ({"job/cpu.max": "800000 100000", "cpu.max": "400000 100000"}, 4.0),
        ({"cpu/job/cpu.cfs_quota_us": "150000", "cpu/job/cpu.cfs_period_us": "100000"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_the_quota_is_the_smallest_of_all_control_groups(tmp_path, monkeypatch, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content + "\n")
    lines = ["3:cpu,cpuacct:/job/step", "2:memory:/job", "0::/job/step"]
    monkeypatch.setattr(cores, "CGROUPS", str(tmp_path))
    monkeypatch.setattr(cores, "own_groups", lambda: lines)
    assert cores.cpu_quota() == expected


@pytest.mark.parametrize("quota, processes, expected", [(3.5, 1, 3), (16.0, 8, 2), (0.5, 1, 1), (100.0, 2, 32)])
def test_a_quota_limits_the_cores_of_all_processes_together(monkeypatch, quota, processes, expected):
    affinities(monkeypatch, range(64), range(64))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setenv("LOCAL_SIZE", str(processes))
    assert cores.cores_per_process() == expected


def two_nodes(folder, monkeypatch):
    """A machine of 2 NUMA nodes of 32 cores with hyper-threads 64 to 127, and 4 GPUs on each."""
    for node, cpus in enumerate(("0-31,64-95", "32-63,96-127")):
        (folder / f"node{node}").mkdir()
        (folder / f"node{node}/cpulist").write_text(cpus + "\n")
    for number, gpu in enumerate(EIGHT_GPUS):
        (folder / gpu).mkdir()
        (folder / gpu / "numa_node").write_text(f"{number // 4}\n")
    monkeypatch.setattr(cores, "NODES", str(folder))
    monkeypatch.setattr(cores, "DEVICES", str(folder))
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)


def test_reading_stays_near_its_gpu_and_leaves_cores_to_the_step(tmp_path, monkeypatch):
    two_nodes(tmp_path, monkeypatch)
    affinities(monkeypatch, range(128), range(128))
    monkeypatch.setenv("LOCAL_SIZE", "8")
    count, where = cores.cores_near(EIGHT_GPUS, 5)
    assert count == 16 - cores.CORES_OF_THE_STEP and where == {*range(32, 64), *range(96, 128)}
    monkeypatch.setenv("LOCAL_SIZE", "1")
    count, where = cores.cores_near(EIGHT_GPUS[:1], 0)  # one process: the other node's cores are far
    assert count == 64 - cores.CORES_OF_THE_STEP and where == {*range(32), *range(64, 96)}


def test_where_nodes_are_hidden_all_cores_are_near(tmp_path, monkeypatch):
    two_nodes(tmp_path, monkeypatch)
    affinities(monkeypatch, range(16), range(16))
    assert cores.cores_near(["0000:ff:00.0"], 0) == (16 - cores.CORES_OF_THE_STEP, set(range(16)))
    affinities(monkeypatch, range(2), range(2))
    assert cores.cores_near(EIGHT_GPUS[4:5], 0) == (1, {0, 1})


@pytest.mark.parametrize("own, processes, named", [(0, 1, 1), (1, 2, 2), (3, 16, 4), (2, 1, 3)])
def test_the_gpus_are_those_of_the_processes_here(monkeypatch, own, processes, named):
    """WORLD_SIZE counts those of other machines, too; a single process may have any GPU."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(cores, "pci_address", lambda gpu: EIGHT_GPUS[gpu])
    monkeypatch.setattr(cores, "cores_near", lambda gpus, own: (gpus, own))
    assert cores.reading_cores(torch.device("cuda", own)) == (EIGHT_GPUS[:named], own)


def test_beside_a_cpu_reading_takes_the_cores_that_the_step_takes():
    assert cores.reading_cores(torch.device("cpu")) == (cores.cores_per_process(), os.sched_getaffinity(0))
