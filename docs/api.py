"""The Python interface as one page of Markdown: `python docs/api.py > api.md`."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cached_property

MODULES = [
    *(
        "flperf.forecaster",
        "flperf.config.load",
        "flperf.models.latents",
        "flperf.models.encoder",
        "flperf.objectives.build",
        "flperf.objectives.solvers",
        "flperf.models.baselines",
    ),
    *(
        "flperf.models.heads",
        "flperf.models.heads.predictor",
        "flperf.models.heads.cross_attention",
        "flperf.models.heads.dit",
        "flperf.models.heads.layers",
    ),
    *(
        "flperf.models.attention",
        "flperf.models.backbones.vjepa2",
        "flperf.models.backbones.dinov3",
        "flperf.models.backbones.four_ds",
    ),
    *(
        "flperf.data.dataset",
        "flperf.data.samplers",
        "flperf.data.preprocessing",
        "flperf.data.index",
        "flperf.evaluation.evaluate",
        "flperf.evaluation.visualise",
    ),
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
