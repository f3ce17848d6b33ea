"""Fixtures of all benchmarks: the device and its measured peaks, and how results are recorded and saved.

A GPU runs the reference sizes (ViT-L, 64 frames of 256 x 256), a CPU small ones (width 192, 16 frames of 96 x 96).
Peaks are those of a matrix product and of a copy, measured in the same session. Shares of peak depend less on the
machine than seconds do.

`pytest benchmarks` saves its results in benchmarks/results, which `python -m benchmarks.report` reads. `--quick` runs
the first and the last case of every benchmark once, at toy sizes, and saves nothing. It finds what is broken, not what
is slow.
"""

import gc
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import get_tag

from benchmarks import sizes
from benchmarks.recording import Recorder
from benchmarks.sizes import DEVICE
from flperf.engine.devices import copy_rate, measured_flops
from flperf.training.run_folder import PACKAGES

FOLDER = Path(__file__).parent
KEPT = ("min", "median", "mean", "stddev", "rounds")  # of each benchmark's statistics, in seconds


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help="only check that the benchmarks run: two cases of each, once, at toy sizes"
    )


def pytest_configure(config):
    torch._dynamo.config.recompile_limit = 64  # one process compiles the same blocks at many sizes
    if config.getoption("quick"):
        sizes.be_quick()
    elif [Path(argument).resolve() for argument in config.args] == [FOLDER]:  # the whole suite
        config.option.benchmark_storage = FOLDER.joinpath("results").as_uri()
        config.option.benchmark_autosave = get_tag()  # commit and time: the file's name


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        cases: dict[str, list] = {}
        for item in items:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        items[:] = [item for found in cases.values() for item in found[:1] + found[1:][-1:]]


@pytest.fixture
def benchmark(benchmark, monkeypatch):
    """pytest-benchmark's fixture, with a single round under --quick."""
    if sizes.QUICK:
        pedantic = benchmark.pedantic

        def once(*arguments, **options):
            return pedantic(*arguments, **options | {"rounds": 1, "warmup_rounds": 0})

        monkeypatch.setattr(benchmark, "pedantic", once)
    return benchmark


@pytest.fixture(autouse=True)
def freed():
    """Engines hold themselves in reference cycles; without this, gigabytes of earlier cases stay in memory."""
    yield
    gc.collect()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Drop cases without rounds, at which pytest-benchmark fails, so that an interrupted run saves what it measured."""
    cases = session.config._benchmarksession.benchmarks
    cases[:] = [case for case in cases if case.stats.data]


def pytest_benchmark_update_machine_info(config, machine_info):
    """Record the device, within which results are compared, and the versions of packages."""
    from importlib.metadata import version

    name = (
        torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{torch.get_num_threads()} threads of {_processor()}"
    )
    machine_info["device"] = name
    machine_info["versions"] = {package: version(package) for package in PACKAGES}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keep a few numbers per benchmark, because the files are stored in the repository."""
    machine = output_json["machine_info"]
    output_json["machine_info"] = {key: machine[key] for key in ("device", "versions", "python_version", "release")}
    for entry in output_json["benchmarks"]:
        entry["stats"] = {key: entry["stats"][key] for key in KEPT}
        del entry["options"], entry["params"], entry["param"], entry["name"]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "an unknown processor")


@pytest.fixture(scope="session")
def peaks() -> dict[str, float]:
    """FLOP/s of a matrix product in bf16 and fp32, and bytes/s of a copy (read and written): the best of a few."""
    return {
        "bf16": measured_flops(DEVICE, torch.bfloat16),
        "fp32": measured_flops(DEVICE, torch.float32),
        "copy": copy_rate(DEVICE),
    }


@pytest.fixture
def record(benchmark, peaks) -> Recorder:
    return Recorder(benchmark, peaks)
