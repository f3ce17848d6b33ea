"""One case of each kernel in Triton's interpreter; `pytest` runs it with the unit tests."""

from interpreter import run_interpreted


def test_every_kernel_computes_its_formula():
    run_interpreted("smoke")
