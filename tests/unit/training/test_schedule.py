"""When a run ends, and after which steps a save or a validation is due."""

import math

import pytest

from flperf.config import Trainer
from flperf.training.schedule import Schedule


def due_steps(schedule: Schedule, interval: str) -> list[int]:
    return [done for done in range(schedule.steps.start + 1, schedule.steps.stop + 1) if schedule.due(interval, done)]


def test_a_budget_in_epochs_ends_with_the_step_that_completes_the_last():
    schedule = Schedule(Trainer(batch_size=4, max_steps=None, max_epochs=3), train_size=10, first_step=0)
    assert schedule.total_steps == 8  # 7.5 batches
    assert [schedule.epoch(step) for step in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(
    ("interval", "expected"), [("3", [3, 6, 9, 10]), ("1 epochs", [3, 5, 8, 10]), ("2 epochs", [5, 10])]
)
def test_intervals_are_of_steps_or_epochs_and_the_end_is_always_due(interval, expected):
    schedule = Schedule(Trainer(batch_size=4, max_steps=10), train_size=10, first_step=0)
    assert due_steps(schedule, interval) == expected


def test_a_start_can_stop_early_and_the_next_goes_on():
    trainer = Trainer(batch_size=4, max_steps=10, stop_after=6)
    assert [Schedule(trainer, 10, first_step).steps for first_step in (0, 6)] == [range(0, 6), range(6, 10)]
    assert due_steps(Schedule(trainer, 10, 0), "4") == [4, 6]


def test_dumps_of_one_epoch_have_different_names():
    schedule = Schedule(Trainer(batch_size=4, max_steps=10), train_size=10, first_step=0)
    assert [schedule.dump_name(done) for done in (2, 3, 4, 5)] == [
        "epoch_00_step_000002",
        "epoch_01",
        "epoch_01_step_000004",
        "epoch_02",
    ]


@pytest.mark.parametrize("clips", [1, 4, 10, 12])
def test_each_evaluation_has_a_dump_folder_of_its_own(clips):
    schedule = Schedule(Trainer(batch_size=4, max_steps=30), train_size=clips, first_step=0)
    names = [schedule.dump_name(step) for step in range(31)]
    assert len(set(names)) == 31
    ends = {math.ceil(epoch * clips / 4) for epoch in range(4 * 31)}  # the last steps of epochs
    assert {step for step, name in enumerate(names) if "step" not in name} == ends & set(range(31))
