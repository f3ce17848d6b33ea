"""The training loop's hold on the garbage collector."""

import gc

import pytest

from flperf.training.loop import WARM_UP_STEPS, FrozenGarbage


def test_what_lives_at_the_end_of_the_warm_up_is_not_collected_until_the_run_ends():
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyboardInterrupt), FrozenGarbage() as garbage:
        for step in range(1, WARM_UP_STEPS + 3):
            garbage.step()
            assert (gc.get_freeze_count() > 0) == (step >= WARM_UP_STEPS)
        raise KeyboardInterrupt
    assert gc.get_freeze_count() == 0
