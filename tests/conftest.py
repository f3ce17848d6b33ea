"""Marks by folder, and fixtures that several tests share.

CUDA is visible only where every selected test is one for a GPU (`pytest tests/gpu`, `-m gpu`, `-m "gpu and not slow"`).
The others run processes on the CPU; two of them could not share one GPU.
"""

import os
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression
from runs import TINY

pytest_plugins = ["video_fixtures"]
TESTS = Path(__file__).parent
MARKS = {TESTS / "gpu": "gpu", TESTS / "integration": "slow"}


def pytest_configure(config):
    if not asks_for_gpu_tests_alone(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything initialises CUDA: DeepSpeed does when it is imported


def asks_for_gpu_tests_alone(config) -> bool:
    """Whether the paths or the mark expression select tests marked `gpu` and no others."""
    paths = [config.invocation_params.dir / argument.split("::")[0] for argument in config.args]
    if all(path.resolve().is_relative_to(TESTS / "gpu") for path in paths):
        return True

    def selects(*marks: str) -> bool:
        return Expression.compile(config.option.markexpr).evaluate(lambda name, **_: name in marks)

    return (selects("gpu") or selects("gpu", "slow")) and not (selects() or selects("slow"))


def pytest_collection_modifyitems(items):
    for item in items:
        for folder, mark in MARKS.items():
            if item.path.is_relative_to(folder):
                item.add_marker(mark)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and no tests beside those for a GPU: pytest -m gpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A configuration file that trains in a second on drawn clips; its runs go to a folder of their own."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder))
    return path
