"""Heads of FutureLatents: what of them ours can start from, and what is refused. Old modules are told by names and
shapes alone."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from runs import ROOT
from safetensors.torch import load_file
from torch import Tensor

from flperf.commands.import_weights import head_of, import_weights
from flperf.config import load_config
from flperf.errors import UserError
from flperf.forecaster import read_trained
from flperf.models.heads import use_initial_weights

LATENT, WIDTH, TOKENS = 24, 32, 2 * 2 * 2  # of the tiny configuration; two target frames of 2 x 2


def old_state(prefix: str, *, modulated: bool, width: int = WIDTH, depth: int = 2) -> dict[str, Tensor]:
    """A state with the names and shapes of the old cross-attending heads."""
    linears = {"context_mlp.1": (LATENT, width), "in_proj": (LATENT, width), "final_layer.linear": (width, LATENT)}
    for block in (f"blocks.{number}" for number in range(depth)):
        linears |= {f"{block}.attn.qkv": (width, 3 * width), f"{block}.attn.proj": (width, width)}
        linears |= {f"{block}.cross_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "proj")}
        linears |= {f"{block}.mlp.fc1": (width, 4 * width), f"{block}.mlp.fc2": (4 * width, width)}
        if modulated:
            linears[f"{block}.adaLN_modulation.1"] = (width, 9 * width)
    if modulated:
        linears |= {"time_mlp.0": (width, 4 * width), "time_mlp.2": (4 * width, width)}
        linears["final_layer.adaLN_modulation.1"] = (width, 2 * width)
    state = {}
    for name, (inputs, outputs) in linears.items():
        state |= {f"{prefix}{name}.weight": torch.randn(outputs, inputs), f"{prefix}{name}.bias": torch.randn(outputs)}
    return state | {f"{prefix}blocks.{number}.attn.rope.inv_freq": torch.ones(width // 4) for number in range(depth)}


CROSS_ATTENTION = ["model.head=cross_attention"]
DIT = ["model.head=dit", "objective.kind=flow_matching"]


def import_into(tiny, tmp_path, state: dict[str, Tensor], overrides: list[str]) -> dict[str, Tensor]:
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3}, tmp_path / "old.pt")
    import_weights(
        [str(tmp_path / "old.pt"), "--config", str(tiny), "--out", str(tmp_path / "new/head.safetensors"), *overrides]
    )
    return load_file(tmp_path / "new/head.safetensors")


def test_what_means_the_same_is_taken_and_the_rest_named(tiny, tmp_path, capsys):
    state = old_state("predictor.", modulated=False) | {"target_queries": torch.randn(1, TOKENS, LATENT)}
    weights = import_into(tiny, tmp_path, state, CROSS_ATTENTION)
    assert torch.equal(weights["out.weight"], state["predictor.final_layer.linear.weight"])
    assert torch.equal(weights["blocks.1.mlp.layer.2.bias"], state["predictor.blocks.1.mlp.fc2.bias"])
    projected = state["target_queries"][0] @ state["predictor.in_proj.weight"].T + state["predictor.in_proj.bias"]
    torch.testing.assert_close(weights["target_queries"], F.layer_norm(projected, (WIDTH,), eps=1e-6))
    said = capsys.readouterr().out
    assert "self-attention has rotary positions along the flattened clip, here model.positions 'rope3d'" in said
    assert "cross-attention has no positions" in said and "normalised before its projection" in said
    assert not any(
        "query" in name.split(".")[-2] or name.startswith(("context.", "memory.")) for name in weights if "." in name
    )


def test_cross_attention_is_taken_where_ours_is_told_no_places_either(tiny, tmp_path):
    """An imported block's cross-attention computes what the old formula does, written out here."""
    state = old_state("flow_transformer.", modulated=True)
    overrides = [*DIT, "model.positions=none"]
    weights = import_into(tiny, tmp_path, state, overrides)
    head = head_of(load_config(tiny, overrides))
    use_initial_weights(head, str(tmp_path / "new/head.safetensors"))
    x, context = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    ours = head.blocks[0].cross_attention.layer(x, None, head.memory[0](context, None))
    query, key, value, out = (torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))
    for linear, name in zip((query, key, value, out), ("q_proj", "k_proj", "v_proj", "proj"), strict=True):
        old = {kind: state[f"flow_transformer.blocks.0.cross_attn.{name}.{kind}"] for kind in ("weight", "bias")}
        linear.load_state_dict(old)
    parts = [
        linear(tokens).view(2, -1, 2, WIDTH // 2).transpose(1, 2)
        for linear, tokens in ((query, x), (key, context), (value, context))
    ]
    theirs = out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    torch.testing.assert_close(ours, theirs)
    assert "blocks.0.modulation.weight" in weights and "noised.weight" not in weights


@pytest.mark.parametrize(
    ("state", "overrides", "message"),
    [
        (
            old_state("predictor.", modulated=False),
            DIT,
            r"holds no flow_transformer\.\* for model.head 'dit' \(but predictor\)",
        ),
        (
            old_state("predictor.", modulated=False, width=48),
            CROSS_ATTENTION,
            r"out.weight is \[24, 48\] there, \[24, 32\] here",
        ),
        ({"backbone.conv.weight": torch.ones(3)}, CROSS_ATTENTION, "holds no predictor"),
        ({"optimizer": {}}, CROSS_ATTENTION, "holds no model's state"),
    ],
)
def test_what_fits_no_head_is_refused_with_the_reason(tiny, tmp_path, state, overrides, message):
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(UserError, match=message):
        import_weights(
            [str(tmp_path / "old.pt"), "--config", str(tiny), "--out", str(tmp_path / "head.safetensors"), *overrides]
        )
    assert not (tmp_path / "head.safetensors").exists()


def test_a_file_with_code_in_it_is_not_run(tiny, tmp_path):
    torch.save({"model": print}, tmp_path / "old.pt")
    with pytest.raises(UserError, match="tensors alone"):
        import_weights([str(tmp_path / "old.pt"), "--config", str(tiny), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("junk", [b"junk", b"\x80\x02}q\x00h\x07.", b""])
def test_a_damaged_file_is_named(tiny, tmp_path, junk):
    (tmp_path / "junk.pt").write_bytes(junk)
    with pytest.raises(UserError, match="junk.pt: cannot be read as a checkpoint"):
        import_weights([str(tmp_path / "junk.pt"), "--config", str(tiny), "--out", str(tmp_path / "out")])


def test_a_run_starts_from_initial_weights_or_refuses_them(tiny, tmp_path):
    import_into(tiny, tmp_path, old_state("flow_transformer.", modulated=True), DIT)
    file = tmp_path / "new/head.safetensors"

    def train(*overrides: str) -> subprocess.CompletedProcess:
        command = [
            sys.executable,
            str(ROOT / "flperf/train.py"),
            "--config",
            str(tiny),
            f"model.initial_weights={file}",
            *overrides,
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    # Without a learning rate what is trained is what it started from.
    started = train(*DIT, "name=started", "trainer.max_steps=1", "trainer.learning_rate=0", "trainer.ema_decay=null")
    assert started.returncode == 0, started.stderr[-3000:]
    trained = read_trained(tiny.parent / "experiment/started").weights
    assert all(torch.equal(trained[name], tensor) for name, tensor in load_file(file).items())
    refused = train("name=refused")
    assert "flperf: model.initial_weights: " in refused.stderr and "this head has no such parameter" in refused.stderr
