"""Heads of FutureLatents: which tensors are used, and what is refused. Old states have only names and shapes."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flperf.config import Model
from flperf.errors import UserError
from flperf.models.futurelatents import read_checkpoint, translate
from flperf.models.heads import build_head, use_initial_weights
from flperf.models.latents import LatentGeometry

GEOMETRY = LatentGeometry(context_frames=2, target_frames=2, height=2, width=2, dim=24)
WIDTH = 32


def old_state(prefix: str, *, modulated: bool, width: int = WIDTH, depth: int = 2) -> dict[str, Tensor]:
    """A state with the names and shapes of the old cross-attending heads."""
    dim = GEOMETRY.dim
    linears = {"context_mlp.1": (dim, width), "in_proj": (dim, width), "final_layer.linear": (width, dim)}
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


def model_and_head(head: str, positions: str = "rope3d") -> tuple[Model, nn.Module]:
    model = Model(head=head, hidden_dim=WIDTH, depth=2, num_heads=2, positions=positions)
    return model, build_head(model, GEOMETRY, seed=0, compile=False)


def test_tensors_of_the_same_meaning_are_used_and_the_others_named():
    state = old_state("predictor.", modulated=False)
    state["target_queries"] = torch.randn(1, GEOMETRY.target_tokens, GEOMETRY.dim)
    model, head = model_and_head("cross_attention")
    imported = translate(head, model, state)
    weights = imported.weights
    assert torch.equal(weights["out.weight"], state["predictor.final_layer.linear.weight"])
    assert torch.equal(weights["blocks.1.mlp.layer.2.bias"], state["predictor.blocks.1.mlp.fc2.bias"])
    projected = state["target_queries"][0] @ state["predictor.in_proj.weight"].T + state["predictor.in_proj.bias"]
    torch.testing.assert_close(weights["target_queries"], F.layer_norm(projected, (WIDTH,), eps=1e-6))
    fresh = imported.fresh
    assert "rotary positions along the flattened clip" in fresh["blocks.0.self_attention.layer.query_key_value.weight"]
    assert "cross-attention has no positions" in fresh["memory.1.key_value.weight"]
    assert any("before its projection" in reason for name, reason in fresh.items() if name.startswith("context."))
    parameters = {name for name, _ in head.named_parameters() if "norm" not in name.split(".")}
    assert weights.keys().isdisjoint(fresh) and weights.keys() | fresh.keys() == parameters


def test_cross_attention_without_positions_is_used_too(tmp_path):
    """An imported block computes the same cross-attention as the old formula, which is written out here."""
    state = old_state("flow_transformer.", modulated=True)
    model, head = model_and_head("dit", positions="none")
    weights = translate(head, model, state).weights
    assert "blocks.0.modulation.weight" in weights and "noised.weight" not in weights
    save_file(weights, tmp_path / "head.safetensors")
    use_initial_weights(head, str(tmp_path / "head.safetensors"))
    x, context = torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH)
    new = head.blocks[0].cross_attention.layer(x, None, head.memory[0](context, None))
    query, key, value, out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
    for linear, name in zip((query, key, value, out), ("q_proj", "k_proj", "v_proj", "proj"), strict=True):
        old = {kind: state[f"flow_transformer.blocks.0.cross_attn.{name}.{kind}"] for kind in ("weight", "bias")}
        linear.load_state_dict(old)
    parts = [
        linear(tokens).view(2, -1, 2, WIDTH // 2).transpose(1, 2)
        for linear, tokens in ((query, x), (key, context), (value, context))
    ]
    expected = out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
    torch.testing.assert_close(new, expected)


@pytest.mark.parametrize(
    ("state", "head", "message"),
    [
        (
            old_state("predictor.", modulated=False),
            "dit",
            r"has no flow_transformer\.\* for model.head 'dit' \(but pred",
        ),
        (
            old_state("predictor.", modulated=False, width=48),
            "cross_attention",
            r"out.weight is \[24, 48\] in the checkpoint, \[24, 32\] in this head",
        ),
        ({"backbone.conv.weight": torch.ones(3)}, "cross_attention", r"has no predictor\.\*"),
    ],
)
def test_a_state_that_fits_no_head_is_refused_with_the_reason(state, head, message):
    model, head = model_and_head(head)
    with pytest.raises(UserError, match=message):
        translate(head, model, state)


def test_a_checkpoint_may_be_wrapped_and_hold_more_than_the_model(tmp_path):
    torch.save({"model": {"module.x": torch.ones(2)}, "optimizer": {}, "epoch": 3}, tmp_path / "old.pt")
    assert read_checkpoint(tmp_path / "old.pt").keys() == {"x"}
    torch.save({"x": torch.ones(2)}, tmp_path / "bare.pt")
    assert read_checkpoint(tmp_path / "bare.pt").keys() == {"x"}


def saved(path: Path, content) -> Path:
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "old.pt: can't be read as a checkpoint"),
        (b"\x80\x02}q\x00h\x07.", "old.pt: can't be read as a checkpoint"),
        (b"", "old.pt: can't be read as a checkpoint"),
        ({"model": print}, "checkpoint of tensors"),  # a file with code, which is not run
        ({"optimizer": {}}, "old.pt: has no state of a model"),
    ],
)
def test_a_file_without_a_state_is_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_checkpoint(saved(tmp_path / "old.pt", content))
