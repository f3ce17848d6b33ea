"""How modules are compiled: the repeated block, not the whole network.

All blocks of one class share one compilation, so the time to the first step does not grow with depth: on a 4-layer
encoder a third of the whole graph's, at the same speed after it.
"""

import sys
from functools import wraps

import torch
import torch.distributed as dist
from torch import nn

ERASE_LINE = "\r\033[K"


def compile_forward(module: nn.Module, name: str) -> None:
    """Compile a module's forward into one graph (a graph break is an error); the first pass, which compiles, shows
    `name`.

    The method is wrapped, not the module: hooks (ZeRO 3 gathers parameters in them) stay outside the compiled region,
    and parameter names stay what they are.
    """
    compiled, first = torch.compile(module.forward, fullgraph=True, dynamic=False), True

    @wraps(module.forward)
    def forward(*inputs, **named):
        nonlocal first
        if torch.compiler.is_compiling() or not first:  # as a part of something larger, which is compiled as a whole
            return compiled(*inputs, **named)
        first = False
        _show(f"compiling {name} …")
        output = compiled(*inputs, **named)
        _show("")
        return output

    module.forward = forward


def _show(text: str) -> None:
    """One line of the main process that the next one replaces; nothing where no one is watching."""
    if sys.stderr.isatty() and (not dist.is_initialized() or dist.get_rank() == 0):
        print(ERASE_LINE + text, end="", file=sys.stderr, flush=True)
