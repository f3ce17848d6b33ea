"""Checkpoints: the same state at any number of processes and ZeRO stage, whole after kills, damage and full disks."""

import os
import random
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import checkpoints as ranks
from ranks.curves import curves
from safetensors.torch import load_file
from worlds import CONTEXT, World, run_world

from flperf.engine.checkpoint_files import (
    Damaged,
    candidates,
    check,
    index_text,
    latest_checkpoint,
    read_index,
    read_weights,
)
from flperf.errors import UserError

NEWEST = "step_00000002"
PRECISIONS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> Path:
    """By precision: a checkpoint that two processes wrote at ZeRO 2, and its state as DeepSpeed reads it."""
    folder = tmp_path_factory.mktemp("states")
    for precision in PRECISIONS:
        tensors = run_world(2, ranks.write_states, str(folder / precision), precision)
        assert tensors == [1 + 4 * 21] * 2  # the step, and four states of 21 parameters
    return folder


@pytest.fixture(scope="module")
def differences(states) -> dict[int, list[dict]]:
    """By world size and rank: what differs from the state that was written, by precision and stage."""
    return {size: run_world(size, ranks.read_all_states, str(states)) for size in (1, 4)}


@pytest.mark.parametrize("stage", ranks.STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world_size", [1, 4])
def test_what_two_processes_wrote_at_zero_2_is_the_same_state_anywhere(differences, world_size, precision, stage):
    """Bit for bit, as values are copied and never computed: master weights, moments, moving average, Adam's step, the
    parameters that are computed with on every process, and what is written from there again."""
    assert [found[f"{precision} ZeRO {stage}"] for found in differences[world_size]] == [[]] * world_size


def test_a_checkpoint_of_an_untrained_head_changes_nothing(tmp_path):
    """Its optimizer has no state yet at ZeRO 0, 1 and 2, and zeros at ZeRO 3."""
    assert run_world(1, ranks.begin_again, str(tmp_path)) == [{"0 3": [], "1 0": [], "3 2": []}]


def test_the_loss_goes_on_at_another_world_size_and_stage(tiny):
    """2 processes at ZeRO 2, then 1 at ZeRO 0 or 4 at ZeRO 3, against one undisturbed run: the order of sums alone
    differs, hence the fp32 tolerance of 1e-5 derived in test_zero_stages."""

    def train(processes: int, name: str, stage: int, *overrides: str) -> dict:
        common = ["trainer.max_steps=6", "dataset.shapes.validation_clips=0", f"engine.zero_stage={stage}"]
        return run_world(processes, curves, str(tiny), {name: [*common, *overrides]})[0][name]

    whole, first = train(1, "whole", 0), train(2, "first", 2, "trainer.stop_after=3")
    for processes, stage in ((1, 0), (4, 3)):
        name = f"rest on {processes}"
        shutil.copytree(tiny.parent / "experiment/first", tiny.parent / "experiment" / name)
        second = train(processes, name, stage)
        assert second["step"] == whole["step"] == [1, 2, 3, 4, 5, 6]
        assert first["seen"] + second["seen"] == whole["seen"] and len(whole["seen"]) == 6
        assert second["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_write_killed_at_any_moment_leaves_whole_checkpoints(tmp_path):
    """Both processes of a world are killed at a random moment of its writes, again and again."""
    moments, steps, unfinished = random.Random(0), [], 0
    for _ in range(15):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        with World(2, ranks.save_until_killed, str(tmp_path / "killed"), sender) as world:
            for _ in range(2):
                assert receiver.poll(60), world.stderr
                found = receiver.recv()
            time.sleep(moments.uniform(0, 0.15))
        assert found["intact"]
        steps.append(found["step"])
        unfinished += any(tmp_path.glob("killed/*.unfinished"))
        for checkpoint in candidates(tmp_path / "killed"):
            check(checkpoint)
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] >= 5  # no complete checkpoint was lost
    assert unfinished > 0  # else no kill fell into a write


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


HARMS = {
    "none": [],
    "flipped shard": [(flip, f"{NEWEST}/rank_00001.safetensors")],
    "truncated shard": [(truncate, f"{NEWEST}/rank_00000.safetensors")],
    "truncated index": [(truncate, f"{NEWEST}/checkpoint.json")],
    "missing folder": [(shutil.rmtree, NEWEST)],
    "missing latest": [(Path.unlink, "latest")],
    "both": [(flip, f"{NEWEST}/rank_00000.safetensors"), (truncate, "step_00000001/rank_00001.safetensors")],
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """By harm: the checkpoints of steps 1 and 2 of two processes, the newest of them or both harmed. Their writer
    overwrote its whole state right after each `save`."""
    folder = tmp_path_factory.mktemp("damaged")
    run_world(2, ranks.write_filled, str(folder / "whole"), [1, 2])
    for name, harms in HARMS.items():
        shutil.copytree(folder / "whole", folder / name)
        for harm, path in harms:
            harm(folder / name / path)
    return folder


@pytest.fixture(scope="module")
def found(damaged) -> dict[str, tuple]:
    """By harm and rank: what a resume on two processes found."""
    by_rank = run_world(2, ranks.resume_from, [str(damaged / name) for name in HARMS])
    return dict(zip(HARMS, zip(*by_rank, strict=True), strict=True))


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        ("flipped shard", f"{NEWEST}/rank_00001.safetensors"),
        ("truncated shard", f"{NEWEST}/rank_00000.safetensors"),
        ("truncated index", f"{NEWEST}/checkpoint.json"),
        ("missing folder", f"{NEWEST}/checkpoint.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(found, harm, file):
    first, second = found[harm]
    assert first["step"] == second["step"] == 1 and first["intact"] and second["intact"]
    assert len(first["said"].splitlines()) == 1 and f"{harm}/{file}: " in first["said"]
    assert second["said"] == ""


def test_if_all_are_damaged_the_error_names_them_all(found):
    for rank in found["both"]:
        assert f"{NEWEST}/rank_00000.safetensors" in rank["error"]
        assert "step_00000001/rank_00001.safetensors" in rank["error"]


@pytest.mark.parametrize("harm", ["none", "missing latest"])
def test_the_state_is_that_of_its_step_though_training_went_on(found, harm):
    assert list(found[harm]) == [{"step": 2, "intact": True, "said": ""}] * 2


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


@pytest.fixture
def tmpfs(tmp_path) -> Path:
    """A small file system of its own, where mounting is permitted."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def assert_full_disk_is_survived(rank: dict) -> None:
    assert f"{NEWEST}.unfinished/rank_0000" in rank["error"] and "cannot be written" in rank["error"]
    assert rank["latest"] == "step_00000001" and rank["left"] == ["latest", "step_00000001"]
    assert rank["found"] == {"step": 1, "intact": True, "said": ""}
    assert rank["after"] == {"step": 2, "intact": True, "said": ""}


def test_a_full_disk_ends_in_one_error_and_the_checkpoint_before(tmpfs):
    for rank in run_world(2, ranks.fill_disk, str(tmpfs / "checkpoints"), "tmpfs"):
        assert_full_disk_is_survived(rank)


def test_a_disk_full_for_one_process_ends_all(tmp_path):
    """By a limit on file sizes (RLIMIT_FSIZE) of the second process, of which the first must hear."""
    for rank in run_world(2, ranks.fill_disk, str(tmp_path / "checkpoints"), "size"):
        assert_full_disk_is_survived(rank)
        assert "rank_00001" in rank["error"]


@pytest.mark.parametrize("name", ["checkpoint.json", "rank_00000.safetensors", "rank_00001.safetensors"])
def test_every_flipped_bit_and_missing_end_shows(damaged, tmp_path, name):
    copy, bits = tmp_path / "checkpoints", random.Random(0)
    shutil.copytree(damaged / "none", copy)
    path = copy / NEWEST / name
    content = path.read_bytes()
    for _ in range(25):
        bit = bits.randrange(8 * len(content))
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=str(path)):
            check(copy / NEWEST)
        path.write_bytes(content[: bit // 8])
        with pytest.raises(Damaged, match=str(path)):
            check(copy / NEWEST)
    with pytest.raises(Damaged, match=str(path)):
        read_weights(copy / NEWEST, average=False)
    assert latest_checkpoint(copy) == copy / "step_00000001"
    path.write_bytes(content)
    assert latest_checkpoint(copy) == copy / NEWEST


def test_weights_and_their_average_are_read_without_an_engine(states, tmp_path):
    reference = load_file(states / "fp32/reference.safetensors")
    checkpoint = latest_checkpoint(states / "fp32")
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
