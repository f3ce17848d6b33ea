"""Print the Python interface as one page of Markdown: `python docs/api.py > api.md`."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType

MODULES = [
    "flperf.forecaster",
    "flperf.train",
    "flperf.config",
    "flperf.errors",
    "flperf.data",
    "flperf.data.samplers",
    "flperf.data.annotations",
    "flperf.data.index",
    "flperf.models.latents",
    "flperf.models.encoder",
    "flperf.models.baselines",
    "flperf.models.attention",
    "flperf.models.backbones",
    "flperf.models.heads",
    "flperf.models.heads.layers",
    "flperf.models.heads.positions",
    "flperf.objectives.build",
    "flperf.objectives.regression",
    "flperf.objectives.flow_matching",
    "flperf.objectives.solvers",
    "flperf.evaluation.evaluate",
    "flperf.evaluation.visualise",
    "flperf_kernels.flow_matching",
    "flperf_kernels.flow_matching_reference",
    "flperf_kernels.residual_norm",
    "flperf_kernels.bias_gradients",
    "flperf_kernels.philox",
]
PROPERTIES = (property, cached_property)
KERNELS = "flperf_kernels."  # only their operators and references are public, not how kernels are launched


def is_public(module: ModuleType, name: str, item: object) -> bool:
    """Whether a module defines a class or function, or, if it is a package, shows one of its own modules'."""
    if name.startswith("_") or not (inspect.isclass(item) or inspect.isfunction(item)):
        return False
    if module.__name__.startswith(KERNELS) and (inspect.isclass(item) or name.endswith("_launch")):
        return False
    own = item.__module__ == module.__name__
    return own or (hasattr(module, "__path__") and item.__module__.startswith(f"{module.__name__}."))


def entries(module: ModuleType) -> Iterator[tuple[str, object]]:
    """(name, object) of a module's public functions and classes, and of their methods and properties."""
    for name, item in vars(module).items():
        if not is_public(module, name, item):
            continue
        yield name, item
        if inspect.isclass(item):
            for part, member in vars(item).items():
                if not part.startswith("_") and (inspect.isroutine(member) or isinstance(member, PROPERTIES)):
                    yield f"{name}.{part}", getattr(item, part) if isinstance(member, classmethod) else member


def page() -> str:
    """The Markdown text: a heading with signature and docstring for each entry."""
    lines = ["# The Python interface\n"]
    for path in MODULES:
        module = importlib.import_module(path)
        lines.append(f"## `{path}`\n\n{inspect.getdoc(module) or ''}\n")
        for name, item in entries(module):
            bare = isinstance(item, PROPERTIES) or (inspect.isclass(item) and issubclass(item, Exception))
            signature = "" if bare else str(inspect.signature(item))
            lines.append(f"### `{name}{signature}`\n\n{inspect.getdoc(item) or ''}\n")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(page())
