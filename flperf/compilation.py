"""How modules are compiled: the repeated block, not the whole network.

All blocks of one class share one compilation, so the time to the first step does not grow with depth: on a 4-layer encoder a
third of the whole graph's, at the same speed after it.
"""

import torch
from torch import nn


def compile_forward(module: nn.Module) -> None:
    """Compile a module's forward into one graph (a graph break is an error).

    The method is wrapped, not the module: hooks (ZeRO 3 gathers parameters in them) stay outside the compiled region, and parameter
    names stay what they are.
    """
    module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)
