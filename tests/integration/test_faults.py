"""What a run does when something goes wrong: it ends with one clear line, and loses no finished step."""

import itertools
import json
import math
import os
import signal
from pathlib import Path
from unittest import mock

import pytest
from worlds import flperf

from flperf.engine import preemption
from flperf.engine.checkpoint_files import latest_checkpoint, read_index, read_weights
from flperf.engine.compile_cache import CACHE_VARIABLES
from flperf.errors import UserError
from flperf.objectives.regression import Regression
from flperf.train import train
from flperf.training import loop


@pytest.fixture
def here(tiny, tmp_path, monkeypatch):
    """Trains in this process, which it leaves as it was. Returns the run's folder and the exception that ended it."""
    handlers = {number: signal.getsignal(number) for number in preemption.STOP_SIGNALS}
    monkeypatch.setattr(preemption, "_received", [])

    def start(name: str, *arguments: str) -> tuple[Path, BaseException | None]:
        folder, end = tiny.parent / "experiment" / name, None
        try:
            train(["--config", str(tiny), f"name={name}", *arguments])
        except (UserError, SystemExit) as error:
            end = error
        return folder, end

    with mock.patch.dict(os.environ, dict.fromkeys(CACHE_VARIABLES, str(tmp_path))):
        yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_diverging_run_ends_with_one_clear_line(tiny):
    overrides = ["trainer.learning_rate=1e38", "trainer.max_steps=50", "trainer.max_skipped_updates=3"]
    finished = flperf("train", "--config", str(tiny), "name=diverging", "engine.zero_stage=2", *overrides, processes=2)
    assert finished.returncode != 0
    assert "3 updates in a row had a non-finite loss or gradient" in finished.stderr, finished.stderr[-2000:]
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_non_finite_loss_costs_one_update(here, monkeypatch, stage, precision):
    """It is skipped and counted, but not by Adam's bias correction; what follows is finite, and so are the weights and
    their moving average."""
    loss, calls = Regression.loss, itertools.count(1)
    monkeypatch.setattr(
        Regression, "loss", lambda *inputs, **more: loss(*inputs, **more) * (math.nan if next(calls) == 3 else 1)
    )
    options = [f"engine.zero_stage={stage}", f"engine.precision={precision}", "trainer.max_steps=6"]
    folder, end = here(f"once-{stage}-{precision}", *options, "dataset.shapes.validation_clips=0")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert end is None and [line["skipped_updates"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    assert all(line["grad_norm"] > 0 for line in lines[3:])
    checkpoint = latest_checkpoint(folder / "checkpoints")
    index = read_index(checkpoint)
    assert (index.step, index.optimizer_step, index.skipped_updates) == (6, 5, 1)
    for average in (False, True):
        assert all(tensor.isfinite().all() for tensor in read_weights(checkpoint, average).values())


def test_a_signal_is_obeyed_before_the_next_validation(here, monkeypatch):
    """The vote on it takes one step; the validation that is then due would take the time that is left."""
    steps, validated = loop.train_step, []

    def step(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return steps(*arguments)

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "validate", lambda run, tracker, schedule, step: validated.append(step))
    folder, end = here("obedient", "evaluation.eval_every=1")
    assert isinstance(end, preemption.Preempted) and validated == [1]
    assert latest_checkpoint(folder / "checkpoints").name == "step_00000002"


def test_a_failed_validation_leaves_a_checkpoint_of_its_step(here, monkeypatch):
    def fail(*_):
        raise UserError("no clip can be read")

    monkeypatch.setattr(loop, "validate", fail)
    folder, end = here("unlucky", "evaluation.eval_every=2", "checkpoint.save_every=2")
    assert "no clip can be read" in str(end) and latest_checkpoint(folder / "checkpoints").name == "step_00000002"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset.kind=kinetics_400", "dataset.train=nowhere.csv"], "dataset.train"),
        (["dataset.kind=kinetics_400_cached", "dataset.train=nowhere.csv"], "dataset.train"),
        (["backbone.weights=/no/such/folder"], "backbone"),
        (["model.num_context_latents=9"], "model.num_context_latents"),
        (["model.head=dit"], "objective.kind"),
        (["model.hiden_dim=3"], "did you mean model.hidden_dim"),
    ],
)
def test_a_mistake_is_named_before_a_folder_is_made(here, overrides, message):
    folder, end = here("mistake", *overrides)
    assert isinstance(end, UserError) and message in str(end) and "\n" not in str(end)
    assert not folder.exists()


def test_a_mistake_ends_the_command_in_one_line(tiny):
    finished = flperf("train", "--config", str(tiny), "name=mistake", "model.num_context_latents=9")
    assert finished.returncode == 1 and "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("flperf: model.num_context_latents")
