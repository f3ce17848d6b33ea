"""What the generated kernels of a block read and write, counted for a GPU without one."""

import pytest

from benchmarks.pass_report import count, passes


@pytest.mark.parametrize(
    ("name", "generated", "own", "plain"), [("predictor", 1.1, 26.1, 39.2), ("DiT", 0.1, 43.2, 65.6)]
)
def test_backward_sums_take_no_passes_of_their_own(name, generated, own, plain):
    """With flperf's kernels Inductor sums the gradient of one bias, the predictor's last. Forward is the same."""
    (forward, backward), (plain_forward, plain_backward) = (count(name, fused) for fused in (True, False))
    ours = [kernel for kernel in backward if kernel[0].endswith("_backward")]
    assert passes(ours) <= own and passes(backward) - passes(ours) <= generated
    assert passes(plain_backward) <= plain
    assert passes(forward) == pytest.approx(passes(plain_forward), abs=0.1)
