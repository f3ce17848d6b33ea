"""`flperf import-weights`: what it writes and reports, and a run that starts from it."""

import pytest
import torch
from safetensors.torch import load_file

from flperf.commands.import_weights import import_weights
from flperf.config import load_config
from flperf.engine.process import start_process
from flperf.errors import UserError
from flperf.run import build_components, build_training_engine, evaluation_share

DIT = ["model.head=dit", "objective.kind=flow_matching"]


@pytest.fixture
def old(tmp_path):
    """A checkpoint with the output layer of an old DiT."""
    state = {"weight": torch.randn(24, 32), "bias": torch.randn(24)}
    state = {f"module.flow_transformer.final_layer.linear.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state}, tmp_path / "old.pt")
    return tmp_path / "old.pt"


def new_engine(config):
    process = start_process()
    return build_training_engine(build_components(config, process, evaluation_share(config, process)))


def test_a_run_starts_from_the_imported_weights_or_refuses_them(tiny, old, tmp_path, capsys):
    file = tmp_path / "new/head.safetensors"
    import_weights([str(old), "--config", str(tiny), "--out", str(file), *DIT])
    printed = capsys.readouterr().out
    assert f"{file}: 2 tensors" in printed and f"model.initial_weights={file}" in printed
    assert "has no counterpart in FutureLatents" in printed
    weights = load_file(file)
    assert weights.keys() == {"out.weight", "out.bias"}
    parameters = dict(new_engine(load_config(tiny, [*DIT, f"model.initial_weights={file}"])).module.named_parameters())
    assert all(torch.equal(parameters[name].float(), tensor) for name, tensor in weights.items())
    (tmp_path / "other.yaml").write_text(f"inherits: [{tiny}]\nmodel: {{initial_weights: {file}, hidden_dim: 64}}")
    with pytest.raises(UserError, match=r"model.initial_weights: .* this head has \[24, 64\]"):
        new_engine(load_config(tmp_path / "other.yaml"))


def test_a_checkpoint_of_another_head_is_named_and_nothing_written(tiny, old, tmp_path):
    arguments = [str(old), "--config", str(tiny), "--out", str(tmp_path / "head.safetensors")]
    with pytest.raises(UserError, match=r"old.pt: has no predictor\.\* for model.head 'predictor'"):
        import_weights(arguments)
    assert not (tmp_path / "head.safetensors").exists()
