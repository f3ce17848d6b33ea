"""What a run leaves in its folder, and what `--dry-run`, `--debug`, `--profile` and `--overwrite` do to it."""

import gzip
import json
import re

import pytest
from runs import REGIMES
from worlds import flperf

from flperf.config import dump_config, load_config

LOGGED = (
    "step epoch loss lr grad_norm clips_per_s tokens_per_s step_ms data_ms encode_ms head_ms optim_ms mfu memory_gb"
)


@pytest.fixture
def train(tiny):
    def start(name: str, *arguments: str, processes: int | None = None):
        return flperf("train", "--config", str(tiny), f"name={name}", *arguments, processes=processes)

    return start


def test_a_run_describes_itself_and_is_not_overwritten(tiny, train):
    assert train("kept", "trainer.max_steps=2").returncode == 0
    folder = tiny.parent / "experiment/kept"
    description = json.loads((folder / "run.json").read_text())
    assert description["world_size"] == 1 and description["versions"]["torch"] and description["command"]
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert {*LOGGED.split(), "skipped_clips", "short_clips"} <= line.keys()

    other = train("kept", "trainer.max_steps=2", "model.depth=3")
    assert other.returncode != 0 and "model.depth: 2 -> 3" in other.stderr and "Traceback" not in other.stderr
    again = train("kept", "trainer.max_steps=2", "tracking.log_every=2")
    assert again.returncode == 0 and "step 2 of 2" in again.stdout
    replaced = train("kept", "trainer.max_steps=2", "model.depth=3", "--overwrite")
    assert replaced.returncode == 0 and (folder.parent / "kept.replaced-1/metrics.jsonl").exists()


def test_a_dry_run_prints_sizes_and_writes_nothing(tiny, train):
    finished = train("dry", "--dry-run", *REGIMES["flow_matching"], processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for word in ("hidden_dim: 32", "training clips", "parameters", "FLOPs", "memory"):
        assert word in finished.stdout
    assert not (tiny.parent / "experiment/dry").exists()


def test_a_dry_run_ignores_an_earlier_run(tiny, train):
    folder = tiny.parent / "experiment/earlier"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(load_config(tiny, ["name=earlier", "seed=7"])))
    assert train("earlier", "--dry-run").returncode == 0
    assert "seed: 7 -> 0" in train("earlier").stderr and [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_debug_runs_are_small_and_apart(tiny, train):
    finished = train("debugged", "--debug")
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = tiny.parent / "experiment/debug/debugged"
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    assert not (tiny.parent / "experiment/debugged").exists()


def test_a_profile_shows_where_a_step_goes(tiny, train):
    finished = train("profiled", "--profile", "trainer.max_steps=12")
    assert finished.returncode == 0, finished.stderr[-3000:]
    folder = tiny.parent / "experiment/profiled/profile"
    rows = [
        re.fullmatch(r"\s*(.+?)\s+([\d.]+) ms\s+[\d.]+%", line).groups()
        for line in (folder / "table.txt").read_text().splitlines()
    ]
    milliseconds = {name: float(value) for name, value in rows}
    parts = sum(value for name, value in milliseconds.items() if not name.startswith("of it") and name != "whole step")
    assert milliseconds["head, backward"] > 0 and parts == pytest.approx(milliseconds["whole step"], rel=0.2)
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert any(event.get("name") == "flperf encode" for event in trace["traceEvents"])
