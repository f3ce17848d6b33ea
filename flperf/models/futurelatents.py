"""Weights of FutureLatents: which tensors of an old checkpoint a head can start its training from.

The heads of the two projects compute different functions, so a tensor is used only where it has the same meaning:

    used   output layer, MLPs, modulations (both order them by branch, then shift, scale, gate), output projections of
           the attentions; target queries, after their projection and norm; norms, which FutureLatents does not learn:
           1 and 0, as heads here start
    fresh  queries, keys and values of self-attention, where one has positions along the flattened clip and the other
           (t, h, w); those of cross-attention if model.positions is set, since FutureLatents has none there;
           projections of context, noised latents and time, which have other norms and features

FutureLatents' MLPs approximate GELU by tanh; the outputs differ by at most 5e-4.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flperf.config import Model
from flperf.errors import UserError, first_line

PREFIXES = {"predictor": "predictor.", "cross_attention": "predictor.", "dit": "flow_transformer."}  # by model.head
# New module by old module: within a block, and outside.
BLOCK = {
    "attn.qkv": "self_attention.layer.query_key_value",
    "attn.proj": "self_attention.layer.out",
    "cross_attn.q_proj": "cross_attention.layer.query",
    "cross_attn.proj": "cross_attention.layer.out",
    "mlp.fc1": "mlp.layer.0",
    "mlp.fc2": "mlp.layer.2",
    "adaLN_modulation.1": "modulation",
}
OUTER = {"final_layer.linear": "out", "final_layer.adaLN_modulation.1": "modulation"}
INCOMPATIBLE = {  # by the start of a new name, whatever the shape
    "context.": "FutureLatents normalises the context before its projection, flperf after it",
    "noised.": "FutureLatents has a norm after this projection",
    "tau.": "FutureLatents has another embedding of time",
    "mask_token": "FutureLatents has none",
}


@dataclass(frozen=True)
class Imported:
    """The tensors to start from by new name, and for each other parameter the reason why it starts fresh."""

    weights: dict[str, Tensor]
    fresh: dict[str, str]


def translate(head: nn.Module, model: Model, old: dict[str, Tensor]) -> Imported:
    """Match the parameters of `head`, built from `model`, with an old state. Raises `UserError` if none fits."""
    prefix = PREFIXES[model.head]
    part = {name.removeprefix(prefix): tensor for name, tensor in old.items() if name.startswith(prefix)}
    if not part:
        found = ", ".join(sorted({name.split(".")[0] for name in old})) or "nothing"
        raise UserError(f"has no {prefix}* for model.head {model.head!r} (but {found})")
    candidates = renamed(part, old.get("target_queries"))
    rotary = any(name.endswith("rope.inv_freq") for name in part)
    weights, fresh = {}, {}
    for name, parameter in head.named_parameters():
        reason = incompatibility(name, model.positions, rotary)
        if reason is None and name not in candidates:
            reason = "has no counterpart in FutureLatents"
        if reason is None and candidates[name].shape != parameter.shape:
            reason = f"is {list(candidates[name].shape)} in the checkpoint, {list(parameter.shape)} in this head"
        if reason is None:
            weights[name] = candidates[name].float().contiguous()
        elif "norm" not in name.split("."):  # FutureLatents does not learn norms; a fresh one is the same
            fresh[name] = reason
    if "out.weight" not in weights:
        raise UserError(f"does not fit this head: out.weight {fresh['out.weight']}")
    return Imported(weights, fresh)


def renamed(part: dict[str, Tensor], queries: Tensor | None) -> dict[str, Tensor]:
    """The old tensors of a head by new name. `queries` are the old target queries `1 n d`, if the head has any."""
    new = {}
    for name, tensor in part.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, number, inner = module.split(".", 2)
            if inner in BLOCK:
                new[f"blocks.{number}.{BLOCK[inner]}.{kind}"] = tensor
            elif inner == "cross_attn.k_proj":
                value = part[f"blocks.{number}.cross_attn.v_proj.{kind}"]
                new[f"memory.{number}.key_value.{kind}"] = torch.cat([tensor, value])
        elif module in OUTER:
            new[f"{OUTER[module]}.{kind}"] = tensor
    if queries is not None:  # FutureLatents projects and normalises them in every pass, always with the same result
        projected = F.linear(queries[0].float(), part["in_proj.weight"].float(), part["in_proj.bias"].float())
        new["target_queries"] = F.layer_norm(projected, projected.shape[-1:], eps=1e-6)
    return new


def incompatibility(name: str, positions: str, rotary: bool) -> str | None:
    """Why a parameter has another meaning in FutureLatents; None if it has the same.

    `positions` is model.positions; `rotary`: the old head has rotary positions.
    """
    layer = name.split(".")[-2:-1]
    if layer == ["query_key_value"] and (rotary or positions != "none"):
        old = "rotary positions along the flattened clip" if rotary else "no positions"
        return f"self-attention has {old} in FutureLatents, model.positions {positions!r} here"
    if layer in (["query"], ["key_value"]) and positions != "none":
        return f"cross-attention has no positions in FutureLatents, model.positions {positions!r} here"
    return next((reason for start, reason in INCOMPATIBLE.items() if name.startswith(start)), None)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state of the model in an old checkpoint, which may also hold the optimizer's and have the prefix "module.".
    Raises `UserError`."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged file can fail anywhere in the unpickler: KeyError, IndexError, AttributeError …
        raise UserError(f"{path}: can't be read as a checkpoint of tensors ({first_line(error)})") from None
    state = stored.get("model", stored) if isinstance(stored, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: has no state of a model (a dictionary of tensors, or one under 'model')")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}
