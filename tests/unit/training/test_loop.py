"""Names of the folders that evaluations dump to."""

import math
from types import SimpleNamespace

import pytest

from flperf.config import Config, Trainer
from flperf.training.loop import Schedule


@pytest.mark.parametrize("clips", [1, 4, 10, 12])
def test_each_evaluation_has_a_dump_folder_of_its_own(clips):
    run = SimpleNamespace(
        config=Config(trainer=Trainer(batch_size=4, max_steps=30)), dataset=SimpleNamespace(train_size=clips)
    )
    names = [Schedule(run, 0).dump_name(step) for step in range(31)]
    assert len(set(names)) == 31
    ends = {math.ceil(epoch * clips / 4) for epoch in range(4 * 31)}  # the last steps of epochs
    assert {step for step, name in enumerate(names) if "step" not in name} == ends & set(range(31))
