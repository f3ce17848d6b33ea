"""Compile once for all starts: Inductor's, AOT autograd's and Triton's caches beside the runs.

The folder is `<experiment>/compile_cache`, shared by all runs of the experiment and by all processes: entries are
addressed by their content (graph, options, versions, device), so runs of one model that differ in data or learning
rate share them. It lies on the file system of the checkpoints, since a requeued job finds its checkpoints there but
not what another node left in /tmp.
"""

import os
from pathlib import Path

CACHE_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def use_compile_cache(experiment: str) -> None:
    """Name the folder to torch and Triton, unless the user has named one. To be called before torch is imported."""
    for variable, folder in CACHE_VARIABLES.items():
        os.environ.setdefault(variable, str(Path(experiment, "compile_cache", folder).absolute()))


def compile_cache_state() -> str:
    """What this process found so far: "warm" if every graph was there, "cold" if any was compiled, "unused" if there
    was none."""
    from torch._dynamo.utils import counters

    keys = {"aot_autograd": "autograd_cache", "inductor": "fxgraph_cache"}
    compiled = sum(counters[part][f"{key}_{outcome}"] for part, key in keys.items() for outcome in ("miss", "bypass"))
    found = sum(counters[part][f"{key}_hit"] for part, key in keys.items())
    return "cold" if compiled else "warm" if found else "unused"
