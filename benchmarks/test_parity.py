"""`python -m benchmarks.parity --quick` trains in three ways; a test, not a measurement.

python -m pytest benchmarks/test_parity.py --quick
"""

import pytest

from benchmarks import parity, sizes


@pytest.mark.skipif(not sizes.QUICK, reason="is measured by python -m benchmarks.parity")
def test_ways_train_alike(tmp_path):
    assert parity.main(["--quick", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").stat().st_size
