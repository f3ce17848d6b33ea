"""The dashboards of a run that is stopped and resumed: one W&B run, and one TensorBoard curve."""

import json
import struct
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2
from worlds import flperf

OPTIONS = ["trainer.max_steps=3", "evaluation.eval_every=3", "evaluation.dump_examples=1", "checkpoint.save_every=2"]
NUMBERS = {"train/loss", "train/lr", "train/grad_norm", "train/clips_per_s", "train/mfu", "val/loss", "val/skill_l1"}


@pytest.fixture(scope="module")
def resumed(tiny) -> tuple[Path, str]:
    """The folder of a run that stopped after two of its three steps and was resumed, and the output of the second
    start."""
    dashboards = ["name=tracked", "tracking.wandb=offline", "tracking.tensorboard=true"]
    for stop in (["trainer.stop_after=2"], []):
        finished = flperf("train", "--config", str(tiny), *OPTIONS, *dashboards, *stop)
        assert finished.returncode == 0, finished.stderr[-3000:]
    return tiny.parent / "experiment/tracked", finished.stdout


def records(folder: Path) -> list:
    """All records in the W&B files of a run's folder: protobuf messages in LevelDB's log format."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, parts, position = file.read_bytes(), b"", 7
        while position + 7 <= len(data):
            if 32768 - position % 32768 < 7:  # the head of a record is never split over two blocks
                position += 32768 - position % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[position : position + 7])
            parts, position = parts + data[position + 7 : position + 7 + size], position + 7 + size
            if kind in (1, 4):  # a whole record, or the last part of one
                found.append(wandb_internal_pb2.Record.FromString(parts))
                parts = b""
    return found


def test_wandb_has_one_run_with_everything_in_it(resumed):
    folder, output = resumed
    found = records(folder)
    runs = [record.run for record in found if record.WhichOneof("record_type") == "run"]
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    assert len(runs) == 2 and {run.run_id for run in runs} == {run_id} and f"wandb sync --id {run_id}" in output
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["trainer"]["max_steps"] == 3 and config["model"]["head"] == "predictor"
    history = [item for record in found for item in record.history.item]
    names = {item.key or item.nested_key[0] for item in history}
    assert NUMBERS | {"val/errors"} <= names and any(name.startswith("forecast/") for name in names)
    steps = {json.loads(item.value_json) for item in history if "_step" in (item.key, *item.nested_key)}
    assert steps == {1, 2, 3}


def test_tensorboard_shows_numbers_tables_and_pictures(resumed):
    folder, output = resumed
    assert "tensorboard --logdir" in output
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= NUMBERS
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert any("val/errors" in name for name in tags["tensors"]) and tags["images"]
