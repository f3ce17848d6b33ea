"""Internals of DeepSpeed: one file uses them, with the versions that it was checked with."""

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from runs import ROOT

from flperf.config import Engine
from flperf.engine.deepspeed_internals import KNOWN_VERSION, measure_gradients_together, require_known_version
from flperf.errors import UserError

# The public interface of `DeepSpeedEngine` that flperf uses. The wrapped optimizer is not part of it.
PUBLIC = {
    *("module", "device", "backward", "step", "global_steps", "skipped_steps", "get_global_grad_norm"),
    *("zero_optimization_stage", "gradient_accumulation_steps"),
}


@pytest.mark.parametrize("version", ["0.19.0", "0.19.12+4a9f", "0.19.9.dev1"])
def test_any_patch_of_the_known_version_will_do(monkeypatch, version):
    monkeypatch.setattr(deepspeed, "__version__", version)
    require_known_version()


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.19.8"])
def test_another_version_is_refused_with_the_command_to_install_the_known_one(monkeypatch, version):
    monkeypatch.setattr(deepspeed, "__version__", version)
    with pytest.raises(UserError, match=rf"^deepspeed {version} is installed, .*: pip install 'deepspeed~=0\.19\.0'$"):
        require_known_version()


def test_the_pinned_version_is_the_known_one():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pin,) = (dependency for dependency in dependencies if dependency.startswith("deepspeed=="))
    assert pin.removeprefix("deepspeed==").startswith(f"{KNOWN_VERSION}.")


def attributes_of_engines(source: str) -> Iterator[str]:
    """Every attribute that is read from or written to something called `engine`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.attr if isinstance(owner, ast.Attribute) else owner.id if isinstance(owner, ast.Name) else ""
            if name == "engine":
                yield node.attr


def test_nothing_else_reaches_into_an_engine():
    """Everything that is internal hangs on the engine's optimizer, or on a parameter by a name with a prefix."""
    configured = {field.name for field in fields(Engine)}  # of `config.engine`
    used = set()
    for path in (ROOT / "flperf").rglob("*.py"):
        source = path.read_text()
        if path.name != "deepspeed_internals.py":
            used |= set(attributes_of_engines(source))
            assert not [name for name in (".ds_", "._hp_", "__compatible_ops__") if name in source], path
    assert used - configured <= PUBLIC
    assert used >= {"backward", "zero_optimization_stage", "zero_stage"}  # the walk finds both kinds of engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("worst", [1.0, float("inf"), float("nan")])
def test_the_norm_of_gradients(dtype, worst, monkeypatch):
    """That of two processes with equal gradients, without DeepSpeed's padding; -1 if it is not finite."""
    monkeypatch.setattr(deepspeed.comm, "all_reduce", lambda squares, group: squares.mul_(2))
    engine = SimpleNamespace(device="cpu", optimizer=SimpleNamespace(dp_process_group=None))
    measure_gradients_together(engine)
    gradients, pad = [torch.randn(shape).to(dtype) for shape in ((300, 70), (5,), ())], torch.ones(3, dtype=dtype)
    gradients[1][2] = worst
    pad._zero_padding = True
    norm = engine.optimizer.get_grad_norm_direct([*gradients, pad], [])
    flat = torch.cat([gradient.double().flatten() for gradient in gradients])
    expected = (2 * flat.square().sum()).sqrt() if flat.isfinite().all() else torch.tensor(-1.0)
    torch.testing.assert_close(norm, expected.float(), rtol=1e-5, atol=0)
    assert engine.optimizer.get_grad_norm_direct([pad], []) == 0
