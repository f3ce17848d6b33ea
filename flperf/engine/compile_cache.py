"""Keeps compiled code between starts: the caches of Inductor, AOT autograd and Triton.

The folder `<experiment>/compile_cache` is shared by all runs of the experiment and by all processes. The key of an
entry is its content (graph, options, versions, device), so that runs which differ in data or learning rate share
entries. The folder is on the file system of the checkpoints because a requeued job may start on another node, whose
/tmp is empty.
"""

import os
from pathlib import Path

CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def use_compile_cache(experiment: str) -> None:
    """Set the folder for torch and Triton, unless the user has set one. Call it before torch is imported."""
    for variable, folder in CACHE_VARIABLES.items():
        os.environ.setdefault(variable, str(Path(experiment, "compile_cache", folder).absolute()))


def compile_cache_state() -> str:
    """The cache as this process found it: "warm" if every graph was in it, "cold" if any had to be compiled, "unused"
    if there was no graph."""
    from torch._dynamo.utils import counters

    keys = {"aot_autograd": "autograd_cache", "inductor": "fxgraph_cache"}
    compiled = sum(counters[part][f"{key}_{outcome}"] for part, key in keys.items() for outcome in ("miss", "bypass"))
    found = sum(counters[part][f"{key}_hit"] for part, key in keys.items())
    return "cold" if compiled else "warm" if found else "unused"
