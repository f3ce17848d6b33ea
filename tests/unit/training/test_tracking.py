"""What a run leaves on dashboards: one W&B run however often it is resumed, TensorBoard where it is asked for."""

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT
from wandb.proto import wandb_internal_pb2

from flperf.config import Config
from flperf.data import Dataset
from flperf.data.annotations import Annotations
from flperf.engine.process import start_process
from flperf.errors import UserError
from flperf.files import write_atomically
from flperf.train import train
from flperf.training.run_folder import RunFolder
from flperf.training.tracking import Tracker

OPTIONS = ["trainer.max_steps=3", "evaluation.eval_every=3", "evaluation.dump_examples=1", "checkpoint.save_every=2"]
NUMBERS = {"train/loss", "train/lr", "train/grad_norm", "train/clips_per_s", "train/mfu", "val/loss", "val/skill_l1"}


def stop_and_resume(config: Path, *overrides: str) -> str:
    """A run that stops after two of its three steps and is started again; returns what the second start printed."""
    for more in (["trainer.stop_after=2"], []):
        command = [sys.executable, str(ROOT / "flperf/train.py"), "--config", str(config), *OPTIONS, *overrides, *more]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def records(folder: Path) -> list:
    """Everything in the W&B files of a run's folder: LevelDB's log format, protobuf messages inside."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, parts, position = file.read_bytes(), b"", 7
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:  # no record's head is split over two blocks
                position += 32768 - position % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[position : position + 7])
            parts, position = parts + data[position + 7 : position + 7 + size], position + 7 + size
            if kind in (1, 4):  # whole, or the last part
                found.append(wandb_internal_pb2.Record.FromString(parts))
                parts = b""
    return found


def test_wandb_has_one_run_with_everything_in_it(tiny):
    folder = tiny.parent / "experiment/tracked"
    said = stop_and_resume(tiny, "name=tracked", "tracking.wandb=offline")
    found = records(folder)
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    identity = json.loads((folder / "run.json").read_text())["run_id"]
    assert len(runs) == 2 and {run.run_id for run in runs} == {identity} and f"wandb sync --id {identity}" in said
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["trainer"]["max_steps"] == 3 and config["model"]["head"] == "predictor"
    history = [item for record in found for item in record.history.item]
    names = {item.key or item.nested_key[0] for item in history}
    assert NUMBERS | {"val/errors"} <= names and any(name.startswith("forecast/") for name in names)
    steps = {json.loads(item.value_json) for item in history if "_step" in (item.key, *item.nested_key)}
    assert steps == {1, 2, 3}


def test_a_run_keeps_its_identity_and_a_new_one_gets_its_own(tmp_path):
    def identity(name: str) -> str:
        folder = RunFolder(Config(name=name, experiment=str(tmp_path)), debug=False)
        folder.path.mkdir(exist_ok=True)
        return folder.run_id()

    assert identity("first") == identity("first") != identity("second")


def test_other_processes_leave_nothing(tmp_path):
    config = Config(name="second", experiment=str(tmp_path))
    folder = RunFolder(config, debug=False)
    folder.path.mkdir(parents=True)
    tracker = Tracker(config, folder, is_main=False, first_step=0, total_steps=3)
    tracker.log({"step": 1, "loss": 1.0})
    tracker.table("val/errors", ["forecast"], [["mean"]], 1)
    tracker.picture("forecast/clip", tmp_path / "none.png", 1)
    tracker.close()
    assert not list(folder.path.iterdir())


def opened(experiment: Path, *clips: str, overwrite: bool = False) -> RunFolder:
    """The folder of a run on these training clips."""
    config = Config(name="run", experiment=str(experiment))
    folder = RunFolder(config, debug=False)
    folder.open(
        config,
        start_process(),
        Dataset({"train": Annotations(list(clips), [0] * len(clips))}, None, 0),
        overwrite=overwrite,
    )
    return folder


def test_other_training_clips_are_another_run(tmp_path):
    """Neither may be added nor change places: the order of samples is a function of both."""
    opened(tmp_path, "a.mp4", "b.mp4")
    opened(tmp_path, "a.mp4", "b.mp4")
    for clips in (["b.mp4", "a.mp4"], ["a.mp4", "b.mp4", "c.mp4"]):
        with pytest.raises(UserError, match=r"dataset\.train: names other clips .* --overwrite"):
            opened(tmp_path, *clips)
    opened(tmp_path, "b.mp4", "a.mp4", overwrite=True)
    opened(tmp_path, "b.mp4", "a.mp4")


@pytest.mark.parametrize("share", [0, 0.5], ids=["empty", "halved"])
def test_a_torn_file_of_a_run_is_named_or_does_without(tmp_path, share):
    folder = opened(tmp_path, "a.mp4")
    for name in ("config.yaml", "run.json"):
        path = folder.path / name
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=f"{folder.path}/config.yaml: is damaged; remove it"):
        folder.check(Config(name="run", experiment=str(tmp_path)))
    assert opened(tmp_path, "a.mp4").run_id()
    folder.check(Config(name="run", experiment=str(tmp_path)))


def test_a_configuration_cut_after_any_line_is_damaged(tmp_path):
    folder, config = opened(tmp_path, "a.mp4"), Config(name="run", experiment=str(tmp_path))
    path = folder.path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if not line.startswith((" ", "-")))
    for length in range(last + 1):
        path.write_text("".join(lines[:length]))
        with pytest.raises(UserError, match="config.yaml: is damaged; remove it"):
            folder.check(config)
    path.write_text("".join(lines))
    folder.check(config)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "before")
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.write(os.open("/dev/full", os.O_WRONLY), b"!"))
    with pytest.raises(UserError, match=f"{path}: cannot be written: No space left on device"):
        write_atomically(path, "after")
    assert path.read_text() == "before"


def test_an_experiment_that_cannot_be_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"{tmp_path}/file/experiment.*: cannot be written: Not a directory"):
        opened(tmp_path / "file/experiment", "a.mp4")


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


def test_metrics_stay_json(tracker):
    """After a torn line; and of a loss that is no number."""
    tracker.log(LINE | {"loss": math.nan})
    tracker.log({"step": 1, "split": "val", "horizon": {"l1": [1.0, math.inf]}})
    tracker.close()
    first, step, validation = map(json.loads, tracker.folder.metrics.read_text().splitlines())
    assert first == {"step": 1} and step == LINE | {"loss": None} and validation["horizon"]["l1"] == [1.0, None]


def test_a_full_disk_names_the_metrics(tracker):
    with open("/dev/full", "a") as tracker.file:
        for write in (lambda: tracker.log(LINE), tracker.close):
            with pytest.raises(
                UserError, match=f"{tracker.folder.metrics}: cannot be written: No space left on device"
            ):
                write()


def test_progress_without_a_terminal_is_a_line_now_and_then(tracker, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for step, seconds in ((1, 0), (2, 3), (3, 8)):
        now[0] += seconds
        tracker.log(LINE | {"step": step})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 1 of 3", "step 3 of 3"]
    assert "loss 2.0000, 3.0 clips/s" in lines[0] and "waited 1 of 4 ms for data" in lines[0]


def test_tensorboard_that_is_not_installed_is_said_at_once(tiny, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        train(["--config", str(tiny), "name=board", "tracking.tensorboard=true"])
    assert not (tiny.parent / "experiment/board").exists()


def test_tensorboard_shows_numbers_tables_and_pictures(tiny):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert "tensorboard --logdir" in stop_and_resume(tiny, "name=board", "tracking.tensorboard=true")
    events = EventAccumulator(str(tiny.parent / "experiment/board/tensorboard")).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= NUMBERS
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert any("val/errors" in name for name in tags["tensors"]) and tags["images"]
