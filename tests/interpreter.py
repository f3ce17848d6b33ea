"""Tests of Triton's kernels in its interpreter, which needs no GPU."""

import os
import subprocess
import sys

from runs import ROOT


def run_interpreted(selection: str) -> None:
    """Run the tests of kernels/interpreted.py that pytest's -k selects. In a process of their own, since Triton decides
    at its import whether it interprets."""
    tests = str(ROOT / "tests/kernels/interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests, "-k", selection]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0 and "skipped" not in finished.stdout, finished.stdout + finished.stderr
