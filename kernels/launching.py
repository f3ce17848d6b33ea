"""How a kernel is started. Each kernel's file describes a launch as (kernel, grid, arguments, options), so that tests
and benchmarks/kernel_report.py can compile exactly what a call would run, from meta tensors; this runs it."""

import torch
from torch import Tensor

MOST_BLOCKS = 65535  # of CUDA, in the second and third dimension of a grid


def launch(kernel, grid: tuple[int, ...], arguments: dict, options: dict) -> None:
    """Run a kernel on the device of its tensors, those of one dimension made contiguous: kernels know strides of [b,
    n, d] only.

    Raises ValueError where the batch, which is the last dimension of a grid, is larger than CUDA allows.
    """
    if max(grid[1:], default=0) > MOST_BLOCKS:
        raise ValueError(f"a grid of {grid} blocks: CUDA allows at most {MOST_BLOCKS} samples a batch")
    arguments = {
        name: value.contiguous() if isinstance(value, Tensor) and value.dim() == 1 else value
        for name, value in arguments.items()
    }
    # Triton launches on the current device.
    with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
        kernel[grid](**arguments, **options)
