"""`flperf import-weights OLD.pt`: what a head of FutureLatents has learnt, as far as a head of ours can start from it.

The two projects' heads are not the same function, so a tensor is taken only where it does here what it did there:

    taken       output layer, MLPs, modulations (both order them by branch, then shift, scale, gate), the attentions'
    output projections;
                target queries, as their projection and norm leave them; norms, which are not learned there: 1 and 0,
                as ours start
    left fresh  self-attention's queries, keys and values, where one is told positions along the flattened clip, the
    other (t, h, w)
                cross-attention's, where model.positions tells places; there they are not told
                the projections of context, noised latents and time, which stand beside other norms and features there

Its MLPs approximate GELU by tanh, which differs from ours by some 5e-4 at most.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from flperf.commands.common import command_parser, make_folder_of
from flperf.config import Config, Model, load_config
from flperf.data import WITHOUT_VIDEO, Preprocessing, open_dataset
from flperf.errors import UserError, first_line
from flperf.files import atomic_file
from flperf.models.encoder import build_encoder
from flperf.models.heads import build_head
from flperf.models.latents import latent_geometry

CPU = torch.device("cpu")
PREFIXES = {"predictor": "predictor.", "cross_attention": "predictor.", "dit": "flow_transformer."}
# Their modules and ours: within a block, and outside.
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
UNLIKE = {
    "context.": "there the context is normalised before its projection, here after it",
    "noised.": "there a norm follows this projection",
    "tau.": "there time has another embedding",
    "mask_token": "there is none there",
}


@dataclass(frozen=True)
class Imported:
    """Tensors by our names; and why the other parameters stay as they are initialised."""

    taken: dict[str, Tensor]
    fresh: dict[str, str]


def translate(head: nn.Module, model: Model, old: dict[str, Tensor]) -> Imported:
    """Match every parameter of our `head` with the state of an old model. Raises `UserError` where no layer can be
    taken."""
    prefix = PREFIXES[model.head]
    part = {name.removeprefix(prefix): tensor for name, tensor in old.items() if name.startswith(prefix)}
    if not part:
        found = ", ".join(sorted({name.split(".")[0] for name in old})) or "nothing"
        raise UserError(f"holds no {prefix}* for model.head {model.head!r} (but {found})")
    theirs, rotary = in_our_names(part, old.get("target_queries")), any(name.endswith("rope.inv_freq") for name in part)
    taken, fresh = {}, {}
    for name, parameter in head.named_parameters():
        reason = unlike(name, model.positions, rotary)
        if reason is None and name not in theirs:
            reason = "has no counterpart there"
        if reason is None and theirs[name].shape != parameter.shape:
            reason = f"is {list(theirs[name].shape)} there, {list(parameter.shape)} here"
        if reason is None:
            taken[name] = theirs[name].float().contiguous()
        elif "norm" not in name.split("."):  # theirs are not learned, which is how ours start
            fresh[name] = reason
    if "out.weight" not in taken:
        raise UserError(f"fits no such head: out.weight {fresh['out.weight']}")
    return Imported(taken, fresh)


def in_our_names(part: dict[str, Tensor], queries: Tensor | None) -> dict[str, Tensor]:
    """Their tensors by the parameter of ours in the same place."""
    theirs = {}
    for name, tensor in part.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            _, number, inner = module.split(".", 2)
            if inner in BLOCK:
                theirs[f"blocks.{number}.{BLOCK[inner]}.{kind}"] = tensor
            elif inner == "cross_attn.k_proj":
                theirs[f"memory.{number}.key_value.{kind}"] = torch.cat(
                    [tensor, part[f"blocks.{number}.cross_attn.v_proj.{kind}"]]
                )
        elif module in OUTER:
            theirs[f"{OUTER[module]}.{kind}"] = tensor
    if queries is not None:  # learned before a projection and a norm, which do the same to them in every pass
        projected = F.linear(queries[0].float(), part["in_proj.weight"].float(), part["in_proj.bias"].float())
        theirs["target_queries"] = F.layer_norm(projected, projected.shape[-1:], eps=1e-6)
    return theirs


def unlike(name: str, positions: str, rotary: bool) -> str | None:
    """Why a parameter of ours means something else there, whatever its shape."""
    if name.split(".")[-2:-1] == ["query_key_value"] and (rotary or positions != "none"):
        there = "rotary positions along the flattened clip" if rotary else "no positions"
        return f"there self-attention has {there}, here model.positions {positions!r}"
    if name.split(".")[-2:-1] in (["query"], ["key_value"]) and positions != "none":
        return f"there cross-attention has no positions, here model.positions {positions!r}"
    return next((reason for start, reason in UNLIKE.items() if name.startswith(start)), None)


def read_old(path: Path) -> dict[str, Tensor]:
    """The model's state in a checkpoint, which may hold the optimizer's, too, and be wrapped for several processes."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged or foreign file fails anywhere in the unpickler: KeyError, IndexError, AttributeError …
        raise UserError(f"{path}: cannot be read as a checkpoint of tensors alone ({first_line(error)})") from None
    state = stored.get("model", stored) if isinstance(stored, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path}: holds no model's state (a dictionary of tensors, or one under 'model')")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def head_of(config: Config) -> nn.Module:
    """The head that a configuration trains, without opening its data, but for cached latents, which say their own
    shape."""
    if config.dataset.kind in WITHOUT_VIDEO:
        shape = open_dataset(config, None, config.seed).latent_shape
    else:
        preprocessing = Preprocessing.of(config.backbone)
        shape = build_encoder(
            config.backbone, preprocessing, dtype=torch.float32, device=CPU, compile=False
        ).latent_shape(config.dataset.n_frames)
    return build_head(config.model, latent_geometry(config, *shape), seed=config.seed, compile=False)


def import_weights(arguments: list[str]) -> None:
    """`flperf import-weights`: write the tensors that can be taken, and say which can't and why."""
    parser = command_parser(
        "import-weights",
        "Take from a FutureLatents checkpoint what a head of ours can start its training from "
        "(model.initial_weights), and say what "
        "can't be taken and why.",
        "flperf import-weights OLD.pt --config configs/mine.yaml --out head.safetensors",
    )
    parser.add_argument("old", metavar="OLD.pt")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="the configuration of the head, such as import-config wrote"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors, for model.initial_weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    make_folder_of(options.out)
    config = load_config(options.config, options.overrides)
    old, head = read_old(Path(options.old)), head_of(config)
    try:
        imported = translate(head, config.model, old)
    except UserError as error:
        raise UserError(f"{options.old}: {error}") from None
    with atomic_file(Path(options.out)) as unfinished:
        save_file(imported.taken, unfinished)
    elements, total = (
        sum(tensor.numel() for tensor in tensors) for tensors in (imported.taken.values(), head.parameters())
    )
    print(
        f"{options.out}: {len(imported.taken)} tensors, {elements / total:.0%} of the head's parameters; the "
        "others start fresh:"
    )
    for reason in dict.fromkeys(imported.fresh.values()):
        names = [name for name, why in imported.fresh.items() if why == reason]
        print(f"  {len(names):4} such as {names[0]}: {reason}")
    print(f"this is a start, not a trained head; train from it with model.initial_weights={options.out}")
