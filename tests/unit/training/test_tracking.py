"""metrics.jsonl and the progress of a run."""

import json
import math
import time

import pytest

from flperf.config import Config
from flperf.errors import UserError
from flperf.training.run_folder import RunFolder
from flperf.training.tracking import Tracker

LINE = {
    "step": 1,
    "loss": 2.0,
    "clips_per_s": 3.0,
    "step_ms": 4.0,
    "data_ms": 1.0,
    "encode_ms": 1.0,
    "head_ms": 2.0,
    "optim_ms": 0.0,
}


@pytest.fixture
def tracker(tmp_path) -> Tracker:
    config = Config(name="run", experiment=str(tmp_path))
    config.tracking.wandb = "none"
    folder = RunFolder(config, debug=False)
    folder.path.mkdir()
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "lo')  # as a full disk leaves it
    return Tracker(config, folder, is_main=True, first_step=0, total_steps=3)


def test_other_processes_write_nothing(tmp_path):
    config = Config(name="second", experiment=str(tmp_path))
    folder = RunFolder(config, debug=False)
    folder.path.mkdir(parents=True)
    tracker = Tracker(config, folder, is_main=False, first_step=0, total_steps=3)
    tracker.log({"step": 1, "loss": 1.0})
    tracker.table("val/errors", ["forecast"], [["mean"]], 1)
    tracker.picture("forecast/clip", tmp_path / "none.png", 1)
    tracker.close()
    assert not list(folder.path.iterdir())


def test_metrics_are_valid_json(tracker):
    """After an incomplete line, and with values that JSON does not have."""
    tracker.log(LINE | {"loss": math.nan})
    tracker.log({"step": 1, "split": "val", "horizon": {"l1": [1.0, math.inf]}})
    tracker.close()
    first, step, validation = map(json.loads, tracker.folder.metrics.read_text().splitlines())
    assert first == {"step": 1} and step == LINE | {"loss": None} and validation["horizon"]["l1"] == [1.0, None]


def test_the_error_of_a_full_disk_names_the_metrics(tracker):
    with open("/dev/full", "a") as tracker.file:
        for write in (lambda: tracker.log(LINE), tracker.close):
            with pytest.raises(
                UserError, match=f"{tracker.folder.metrics}: cannot be written: No space left on device"
            ):
                write()


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(tracker, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for step, seconds in ((1, 0), (2, 3), (3, 8)):
        now[0] += seconds
        tracker.log(LINE | {"step": step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1 of 3", "step 3 of 3"]
    assert "loss 2.0000, 3.0 clips/s" in lines[0] and "waited 1 of 4 ms for data" in lines[0]
