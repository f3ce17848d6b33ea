"""Checkpoints: the same state at any number of processes and ZeRO stage, whole after kills, damage and full disks."""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import ROOT, TINY
from safetensors.torch import load_file

from flperf.config import Trainer
from flperf.engine.checkpoint_files import (
    Damaged,
    candidates,
    check,
    index_text,
    latest_checkpoint,
    read_index,
    read_weights,
)
from flperf.engine.process import Process, batch_share
from flperf.errors import UserError

NEWEST = "step_00000002"


@pytest.fixture(scope="module")
def tmpfs(tmp_path_factory):
    """A small file system of its own, or None where mounting is not permitted."""
    folder = tmp_path_factory.mktemp("tmpfs")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    yield None if mounted.returncode else folder
    if not mounted.returncode:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def report(folder, tmpfs) -> dict:
    """What tests/launch/checkpoints.py saw in its worlds of 1, 2 and 4 processes."""
    config, results = folder / "tiny.yaml", folder / "results.json"
    config.write_text(TINY.format(folder=folder))
    script = ROOT / "tests/launch/checkpoints.py"
    command = [sys.executable, str(script), str(config), str(folder), str(results), *([str(tmpfs)] if tmpfs else [])]
    path = f"{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": path}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("stage", ["0", "1", "1 accumulated", "2", "3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world_size", ["1", "4"])
def test_what_two_processes_wrote_at_zero_2_is_the_same_state_anywhere(report, world_size, precision, stage):
    """Bit for bit, as values are copied and never computed: master weights, moments, moving average, Adam's step, the
    parameters that are computed with on every process, and what is written from there again."""
    assert report["tensors"] == 1 + 4 * 21  # the step, and four states of 21 parameters
    differences = [found[f"{precision} ZeRO {stage}"] for found in report["states"][world_size]]
    assert differences == [[]] * int(world_size)


def test_a_checkpoint_of_an_untrained_head_changes_nothing(report):
    """Its optimizer has no state yet at ZeRO 0, 1 and 2, and zeros at ZeRO 3."""
    assert report["untrained"] == {"0 3": [], "1 0": [], "3 2": []}


@pytest.mark.parametrize("rest", ["rest on 1", "rest on 4"])
def test_the_loss_goes_on_at_another_world_size_and_stage(report, rest):
    """2 processes at ZeRO 2, then 1 at ZeRO 0 or 4 at ZeRO 3, against one undisturbed run: the order of sums alone
    differs, hence the fp32 tolerance derived in test_training (1e-5)."""
    whole, first, second = (report["curves"][name] for name in ("whole", "first", rest))
    assert second["step"] == whole["step"] == [1, 2, 3, 4, 5, 6]
    assert first["seen"] + second["seen"] == whole["seen"] and len(whole["seen"]) == 6
    assert second["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_write_killed_at_any_moment_leaves_whole_checkpoints(report):
    found = report["killed"]["found"]
    steps = [start["step"] for start in found]
    assert all(start["intact"] for start in found) and report["killed"]["damaged"] == []
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] >= 5  # nothing complete is ever lost
    assert report["killed"]["unfinished"] > 0  # else no kill fell into a write


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        ("flipped shard", f"{NEWEST}/rank_00001.safetensors"),
        ("truncated shard", f"{NEWEST}/rank_00000.safetensors"),
        ("truncated index", f"{NEWEST}/checkpoint.json"),
        ("missing folder", f"{NEWEST}/checkpoint.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(report, harm, file):
    first, second = report["damage"][harm]
    assert first["step"] == second["step"] == 1 and first["intact"] and second["intact"]
    assert len(first["said"].splitlines()) == 1 and f"{harm}/{file}: " in first["said"]
    assert second["said"] == ""


def test_if_all_are_damaged_the_error_names_them_all(report):
    for found in report["damage"]["both"]:
        assert (
            f"{NEWEST}/rank_00000.safetensors" in found["error"]
            and "step_00000001/rank_00001.safetensors" in found["error"]
        )


@pytest.mark.parametrize("harm", ["none", "lost latest"])
def test_the_state_is_that_of_its_step_though_training_went_on(report, harm):
    """The writer of these overwrote its whole state right after each `save`."""
    assert report["damage"][harm] == [{"step": 2, "intact": True, "said": ""}] * 2


@pytest.mark.parametrize(
    ("latest", "steps", "expected"),
    [
        ("step_00000004", [2, 4, 6], [4, 2]),  # 6 was never completed
        ("step_00000000", [2], [2, 0]),  # what it names is missed, and those after it count
        ("step_0000", [2, 4], [4, 2]),
    ],
)
def test_a_damaged_latest_hides_no_checkpoint(tmp_path, latest, steps, expected):
    for step in steps:
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "latest").write_text(latest)
    assert [int(path.name.removeprefix("step_")) for path in candidates(tmp_path)] == expected


@pytest.mark.parametrize("limit", ["size", "tmpfs"])
def test_a_full_disk_ends_in_one_error_and_the_checkpoint_before(report, limit):
    """A full tmpfs; and a limit on file sizes (RLIMIT_FSIZE) on the second process alone, of which the first must
    hear."""
    if limit not in report["disk"]:
        pytest.skip("mounting a tmpfs is not permitted here")
    for found in report["disk"][limit]:
        assert f"{NEWEST}.unfinished/rank_0000" in found["error"] and "cannot be written" in found["error"]
        assert found["latest"] == "step_00000001" and found["left"] == ["latest", "step_00000001"]
        assert found["found"] == {"step": 1, "intact": True, "said": ""}
        assert found["after"] == {"step": 2, "intact": True, "said": ""}
    if limit == "size":
        assert all("rank_00001" in found["error"] for found in report["disk"][limit])


@pytest.mark.parametrize("name", ["checkpoint.json", "rank_00000.safetensors", "rank_00001.safetensors"])
def test_every_flipped_bit_and_lost_end_shows(report, folder, tmp_path, name):
    copy, places = tmp_path / "checkpoints", random.Random(0)
    shutil.copytree(folder / "damages/none", copy)
    path = copy / NEWEST / name
    content = path.read_bytes()
    for _ in range(25):
        place = places.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=str(path)):
            check(copy / NEWEST)
        path.write_bytes(content[: place // 8])
        with pytest.raises(Damaged, match=str(path)):
            check(copy / NEWEST)
    with pytest.raises(Damaged, match=str(path)):
        read_weights(copy / NEWEST, average=False)
    assert latest_checkpoint(copy) == copy / "step_00000001"
    path.write_bytes(content)
    assert latest_checkpoint(copy) == copy / NEWEST


def test_weights_and_their_average_are_read_without_an_engine(report, folder, tmp_path):
    reference = load_file(folder / "states/fp32/reference.safetensors")
    checkpoint = latest_checkpoint(folder / "states/fp32")
    for state, average in (("weight", False), ("ema", True)):
        weights = read_weights(checkpoint, average)
        assert {f"{state}/{name}" for name in weights} == {key for key in reference if key.startswith(f"{state}/")}
        assert all(torch.equal(tensor, reference[f"{state}/{name}"]) for name, tensor in weights.items())

    index = read_index(checkpoint)
    copy = shutil.copytree(checkpoint, tmp_path / "without_average")
    (copy / "checkpoint.json").write_text(
        index_text(replace(index, states=[state for state in index.states if state != "ema"]))
    )
    with pytest.raises(UserError, match=f"{copy}: holds no moving average"):
        read_weights(copy, average=True)
    assert latest_checkpoint(tmp_path) is None


def place(world_size: int, batch_size: int, micro_batch_size: int | None):
    return batch_share(
        Trainer(batch_size=batch_size, micro_batch_size=micro_batch_size),
        Process(0, 0, world_size, torch.device("cpu")),
    )


@pytest.mark.parametrize(
    ("world_size", "micro_batch_size", "expected"),
    [(1, None, 24), (1, 8, 8), (2, 8, 6), (4, 8, 6), (8, 8, 3), (3, 5, 4), (24, 8, 1)],
)
def test_the_batch_stays_at_any_world_size(capsys, world_size, micro_batch_size, expected):
    found = place(world_size, 24, micro_batch_size)
    assert found.micro_batch_size == expected and found.micro_batch_size * found.accumulation_steps * world_size == 24
    assert ("trainer.micro_batch_size: 8" in capsys.readouterr().out) == (micro_batch_size == 8 and expected != 8)


@pytest.mark.parametrize("world_size", [5, 16, 48])
def test_a_batch_that_cannot_be_shared_out_is_refused(world_size):
    with pytest.raises(
        UserError, match=f"trainer.batch_size: 24 clips cannot be shared out evenly among {world_size} processes"
    ):
        place(world_size, 24, 8)
