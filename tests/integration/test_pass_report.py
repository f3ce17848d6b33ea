"""What the generated kernels of a block read and write, counted for a GPU without one."""

import subprocess
import sys

import pytest
from runs import ROOT


def test_backward_sums_take_no_passes_of_their_own():
    """With flperf's kernels Inductor sums the gradient of one bias, the predictor's last. Forward is the same. In a
    process of its own: what one has compiled before changes what Inductor fuses."""
    command = [sys.executable, "-m", "benchmarks.pass_report"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows = [line.rsplit(maxsplit=2) for line in printed.splitlines()]
    counts = {
        name: (float(plain), float(fused)) for name, plain, fused in rows if "," in name and "encoder" not in name
    }
    for head, plain, fused in (("predictor", 39.3, 27.3), ("DiT", 65.7, 43.4)):
        forward, backward = counts[f"{head}, forward"], counts[f"{head}, backward"]
        assert forward[0] == pytest.approx(forward[1], abs=0.2)
        assert backward[0] <= plain and backward[1] <= fused
