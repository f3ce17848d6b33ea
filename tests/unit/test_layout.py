"""Where files may be: kernels know nothing of flperf, and no name hides an installed module."""

import ast
import sys
from importlib.machinery import PathFinder

import pytest
from runs import ROOT


def imported_packages(path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_kernels_import_nothing_of_flperf(path):
    assert not imported_packages(path) & {"flperf", "benchmarks", "tests"}


def test_the_triton_code_does_not_import_the_ops():
    tree = ast.parse((ROOT / "kernels/flow_matching_triton.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "flperf_kernels.flow_matching" not in modules


def test_names_in_flperf_hide_no_installed_module():
    """`deepspeed flperf/train.py` puts flperf/ first in the search path, before the standard library and all
    packages."""
    elsewhere = [folder for folder in sys.path if folder and not (ROOT / "flperf").is_relative_to(folder)]
    names = {path.stem for path in (ROOT / "flperf").iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__"}
    hidden = {name for name in names if PathFinder.find_spec(name, elsewhere) or name in sys.stdlib_module_names}
    assert "train" in names and not hidden
