"""Compiled runs: the losses are the eager ones, and nothing compiles twice."""

import json

import pytest
from flow_matching_training import LinearHead, assert_fused_and_compiled_trains_as_the_reference
from ranks.compiled import train_without_recompiling
from ranks.curves import curves
from runs import REGIMES, TINY
from worlds import run_world

from flperf.engine.compile_cache import CACHE_VARIABLES


def test_compiled_blocks_at_zero_3_train_as_eager_ones(tiny):
    """Two processes, and parameters that come and go under the compiled graphs: the losses must be those of eager
    ZeRO 1."""
    eager = [*REGIMES["flow_matching"], "engine.zero_stage=1", "evaluation.dump_examples=1"]
    compiled = [*REGIMES["flow_matching"], "engine.zero_stage=3", "engine.compile=true"]
    runs, _ = run_world(2, curves, str(tiny), {"eager": eager, "compiled": compiled})
    assert runs["compiled"]["loss"] == pytest.approx(runs["eager"]["loss"], rel=1e-5)
    (example,) = tiny.parent.glob("experiment/eager/dump/*/*")  # one, of one of the processes
    assert (example / "overview.png").is_file()


def test_fused_and_compiled_trains_as_the_reference_in_eager_mode(monkeypatch):
    """One process; losses and weights."""
    assert_fused_and_compiled_trains_as_the_reference(LinearHead, "cpu", "inductor", monkeypatch)


def test_nothing_compiles_twice(tmp_path, monkeypatch):
    """Neither after the second step of a start, nor in a second start, which finds every graph beside the run."""
    for variable in CACHE_VARIABLES:  # set by earlier runs in this process
        monkeypatch.delenv(variable, raising=False)
    config, described = tmp_path / "tiny.yaml", []
    config.write_text(TINY.format(folder=tmp_path))
    run = ["--config", str(config), "name=compiled", *REGIMES["flow_matching"], "engine.compile=true"]
    run += ["model.depth=1", "backbone.architecture.num_hidden_layers=1", "dataset.shapes.validation_clips=0"]
    for stop_after, steps in ((3, 3), (4, 1)):
        assert run_world(1, train_without_recompiling, [*run, f"trainer.stop_after={stop_after}"]) == [steps]
        described.append(json.loads((tmp_path / "experiment/compiled/run.json").read_text()))
    cold, warm = described
    assert (cold["compile_cache"], warm["compile_cache"]) == ("cold", "warm")
    assert warm["first_step_s"] < cold["first_step_s"]
