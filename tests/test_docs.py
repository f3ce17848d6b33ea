"""What the documents say works: their programs run, their commands exist, their examples are compiled and run."""

import importlib.util

import pytest
import torch
from runs import REGIMES, ROOT

from flperf.config import load_config

DOCS = ROOT / "docs"


@pytest.mark.parametrize("regime", ["predictor", "flow_matching"])
def test_the_plain_loop_learns(tiny, regime):
    spec = importlib.util.spec_from_file_location("plain_loop", DOCS / "plain_loop.py")
    plain_loop = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plain_loop)
    losses = plain_loop.train(load_config(tiny, [*REGIMES[regime], "trainer.max_steps=40"]), torch.device("cpu"))
    first, last = (sum(part) / len(part) for part in (losses[:8], losses[-8:]))
    assert last < 0.9 * first


def test_the_plain_loop_is_short():
    assert len((DOCS / "plain_loop.py").read_text().splitlines()) <= 60
