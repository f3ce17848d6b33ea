"""Fixtures and marks that several tests share. Tests see the GPUs with `-m gpu` alone: the others are of processes on
a CPU, two of which could not share one GPU.
"""

import os
from pathlib import Path

import pytest
import torch
from runs import TINY

pytest_plugins = ["video_fixtures"]


def pytest_configure(config):
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # torch looks at it when it is first asked


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and to be asked for: pytest -m gpu")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A configuration file that trains in a second on drawn clips; its runs go to a folder of their own."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "tiny.yaml"
    path.write_text(TINY.format(folder=folder))
    return path


def pytest_collection_modifyitems(items):
    """Tests of modules that start processes of their own are marked, so that `-m "not slow"` leaves the quick ones."""
    for item in items:
        if {"launch", "curves", "subprocess"} & vars(item.module).keys():
            item.add_marker("slow")
