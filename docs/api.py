"""The Python interface as one page of Markdown: `python docs/api.py > api.md`."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cached_property

MODULES = [
    *("flperf.forecaster", "flperf.config", "flperf.latents", "flperf.encoder", "flperf.objective", "flperf.sampler", "flperf.baselines"),
    *("flperf.heads", "flperf.heads.predictor", "flperf.heads.cross_attention", "flperf.heads.dit", "flperf.heads.layers"),
    *("flperf.attention", "flperf.backbones.vjepa2", "flperf.backbones.dinov3", "flperf.backbones.four_ds"),
    *("flperf.data", "flperf.data.clips", "flperf.data.preprocessing", "flperf.data.index", "flperf.evaluation", "flperf.visualise"),
    *("flperf_kernels.flow_matching", "flperf_kernels.adaln", "flperf_kernels.philox"),
]
PROPERTIES = (property, cached_property)
KERNELS = "flperf_kernels."  # of which the ops and references are for users, not what launches them


def entries(module) -> Iterator[tuple[str, object]]:
    """(name, object) of the functions and classes that a module defines, and of their methods and properties."""
    for name, item in vars(module).items():
        public = not name.startswith("_") and (inspect.isclass(item) or inspect.isfunction(item))
        if not public or item.__module__ != module.__name__:
            continue
        if module.__name__.startswith(KERNELS) and "return" not in inspect.get_annotations(item):
            continue
        yield name, item
        if inspect.isclass(item):
            for part, member in vars(item).items():
                if not part.startswith("_") and (inspect.isroutine(member) or isinstance(member, PROPERTIES)):
                    yield f"{name}.{part}", getattr(item, part) if isinstance(member, classmethod) else member


def page() -> str:
    lines = ["# The Python interface\n"]
    for path in MODULES:
        module = importlib.import_module(path)
        lines.append(f"## `{path}`\n\n{inspect.getdoc(module)}\n")
        for name, item in entries(module):
            bare = isinstance(item, PROPERTIES) or (inspect.isclass(item) and issubclass(item, Exception))
            signature = "" if bare else str(inspect.signature(item))
            lines.append(f"### `{name}{signature}`\n\n{inspect.getdoc(item)}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
