"""All cases of the kernels in Triton's interpreter: values and gradients at awkward sizes, strides and offsets."""

from interpreter import run_interpreted


def test_every_case():
    run_interpreted("not smoke")
