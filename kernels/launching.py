"""How kernels are launched.

A file of kernels describes each call as a `Launch`. Tests and benchmarks/kernel_report.py compile a launch ahead of
time from tensors on the meta device; the ops run it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_BLOCKS = 65535  # CUDA's limit for the second and the third dimension of a grid


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel: its arguments by parameter name, and Triton's options such as `num_warps`.

    The last dimension of the grid is the batch.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Run on the device of the tensors. Raises ValueError where the batch exceeds CUDA's limit.

        Kernels take strides for [b, n, d] tensors only, so one-dimensional tensors are made contiguous.
        """
        if max(self.grid[1:], default=0) > MAX_BLOCKS:
            raise ValueError(f"a grid of {self.grid} blocks: CUDA allows at most {MAX_BLOCKS} samples a batch")
        arguments = {
            name: value.contiguous() if isinstance(value, Tensor) and value.dim() == 1 else value
            for name, value in self.arguments.items()
        }
        # Triton launches on the current device.
        with torch.cuda.device_of(next(value for value in arguments.values() if isinstance(value, Tensor))):
            self.kernel[self.grid](**arguments, **self.options)
