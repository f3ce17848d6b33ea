"""A compiled run that fails if anything compiles again after its second step."""

from collections.abc import Sequence

from flperf.train import main
from flperf.training import loop


def train_without_recompiling(arguments: Sequence[str]) -> int:
    """The number of steps taken."""
    import torch._dynamo

    steps, original = [], loop.train_step

    def step(*inputs):
        torch._dynamo.config.error_on_recompile = len(steps) >= 2
        steps.append(1)
        result = original(*inputs)
        torch._dynamo.config.error_on_recompile = False  # an evaluation has graphs of its own
        return result

    loop.train_step = step
    main(list(arguments))
    return len(steps)
