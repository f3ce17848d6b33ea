"""Peak memory and number of matrix products of a function, by PyTorch's profiler."""

import itertools
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def profiled(function: Callable[[], object]) -> tuple[int, int]:
    """The peak of the bytes that a call has allocated and not freed, and its number of matrix products."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    products = sum(event.name() in ("aten::mm", "aten::addmm", "aten::bmm") for event in events)
    return max(itertools.accumulate(change for _, change in changes)), products
