"""`flperf import-config OLD.yaml`: a FutureLatents file as one of ours, and what could not be carried over.

Old files differ in nesting and in case from version to version (`TRAINER.N_FRAMES`, `trainer.training.loss`,
`model.predictor.dit.depth`), but a key's own name always meant the same. So sections are looked through, keys are
found by name, and every key is either translated or reported: none is dropped silently.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flperf.commands.common import command_parser, make_folder_of
from flperf.config import parse_config
from flperf.config.futurelatents import DROPPED, MEANT_NULL, SAME, TRANSLATED, known
from flperf.config.load import layers
from flperf.errors import UserError, first_line

HEADS = {
    "deterministic": ("predictor", "regression"),
    "deterministic_cross_attention": ("cross_attention", "regression"),
    "flow_matching": ("dit", "flow_matching"),
}
DATASETS = {
    "kinetics_400": "kinetics_400",
    "kinetics_400_cached": "kinetics_400_cached",
    "synthetic_bouncing_shapes": "bouncing_shapes",
    "synthetic_bouncing_shapes_video": "bouncing_shapes",
    "synthetic_bouncing_shapes_image": "bouncing_shapes",
    "synthetic_bouncing_shapes_images": "bouncing_shapes",
    "syntheticbouncingshapes": "bouncing_shapes",
    "bouncing_shapes": "bouncing_shapes",
}
SPLITS = {"train": "train", "val": "validation", "validation": "validation", "visualisation": "visualisation"}
Changes = dict[str, Any]
# What FutureLatents does where nothing is said, and ours does otherwise.
ITS_DEFAULTS: Changes = {
    "trainer.warmup_steps": 0,
    "trainer.schedule": "constant",
    "trainer.ema_decay": None,
    "trainer.betas": [0.9, 0.999],
}
ITS_SHAPES: Changes = {"dataset.stride": 1, "dataset.start": "first", "dataset.validation_start": "first"}
NOTES = (
    "the context is encoded by itself; FutureLatents encodes the whole clip at once, which leaks: "
    "backbone.encode=joint does the same",
    "output layers start at zero; learning rate, betas and warm-up are the file's, constant as there: "
    "see trainer.* for better ones",
)


def translate(old: dict, processes: int) -> tuple[Changes, list[str]]:
    """Our keys (dotted) with values, and a line for everything that changed or went. Raises `UserError` for what
    can't be had."""
    kind = dataset_kind(old.get("datasets") or {})
    taken: Changes = {}
    said: list[str] = []
    for path, value in leaves(old):
        name = ".".join(path)
        try:
            changes, line = translated(path, value)
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{name}: {error}") from None
        clash = next((key for key, new in changes.items() if taken.get(key, new) != new), None)
        if clash:  # such as a validation split with another stride than training's
            said.append(f"{name}: left out, {value!r} where {clash} is {taken[clash]!r} already")
            continue
        taken |= changes
        said += [f"{name}: {line}"] if line else []
    per_device, accumulation = taken.setdefault("trainer.micro_batch_size", 1), taken.pop("accumulation", 1)
    said.append(f"trainer.batch_size: {per_device} a device x {accumulation} accumulated x {processes} processes")
    ours = ITS_DEFAULTS | {"trainer.batch_size": per_device * accumulation * processes}
    if kind == "bouncing_shapes":
        ours |= ITS_SHAPES
    else:
        # only its visualisation had them
        taken = {key: value for key, value in taken.items() if not key.startswith("dataset.shapes.")}
    return ours | ({"dataset.kind": kind} if kind else {}) | taken, [*said, *NOTES]


def translated(path: tuple[str, ...], value: Any) -> tuple[Changes, str | None]:
    """What one value becomes, and what to say of it."""
    key, section = path[-1], path[:-1]
    if "visualisation" in section and key != "length":
        return {}, None  # its clips are like those of the other splits
    match key:
        case "type" if section[-1:] == ("model",):
            head, objective = head_and_objective(value)
            return {"model.head": head, "objective.kind": objective}, None
        case "max_grad_value" if value is not None:
            raise UserError("gradients are clipped by their norm; set max_grad_norm and remove this key")
        case "encoder_trainable" if value:
            raise UserError("the encoder is always frozen; remove this key, or set it to false")
        case "max_grad_value" | "encoder_trainable":
            return {}, None
        case "gradient_accumulation_steps":
            return {"accumulation": value}, None
        case _ if key in DROPPED:
            return {}, f"left out, {DROPPED[key]}"
    target, turned = by_section(key, section) or TRANSLATED.get(key, (None, SAME))
    if value is None and key not in MEANT_NULL:
        return {}, None
    if target is None:
        raise UserError("is not a key of FutureLatents that flperf knows; remove it, or say what it should become")
    new = turned(value)
    becomes = "" if new == value or turned is float else f", {value!r} becomes {new!r}"
    return {target: new}, f"is {target} here{becomes}" if becomes or target.split(".")[-1] != key else None


def by_section(key: str, section: tuple[str, ...]) -> tuple[str, Callable[[Any], Any]] | None:
    """Ours for the keys that mean another thing in another section."""
    split = next((SPLITS[part] for part in section if part in SPLITS), "train")
    match key:
        case "csv" | "metadata":
            return f"dataset.{split}", SAME
        case "length":
            return f"dataset.shapes.{split}_clips", SAME
        case "batch_size_per_gpu":
            return "evaluation.batch_size" if "evaluation" in section else "trainer.micro_batch_size", SAME
        case "image_size" if "datasets" in section:
            return "dataset.shapes.image_size", SAME
        case "image_size":
            return "backbone.processor", lambda value: {"size": value, "crop_size": value}
    return None


def head_and_objective(model: str) -> tuple[str, str]:
    if model == "locator":
        raise UserError(
            "a locator is trained by a command of its own, without such a file: see `flperf locator --help`"
        )
    return known(HEADS, model)


def dataset_kind(datasets: dict) -> str | None:
    """Ours, of the training split, or of all splits where the file does not tell them apart."""
    train = datasets.get("train") or {key: value for key, value in datasets.items() if key not in SPLITS}
    names = [train["name"]] if "name" in train else [key for key in train if key in DATASETS]
    if len(names) > 1:
        raise UserError(f"datasets: holds {' and '.join(names)}; leave the one to train on")
    try:
        return known(DATASETS, names[0]) if names else None
    except UserError as error:
        raise UserError(f"datasets.train.name: {error}") from None


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every value that is not itself a mapping; keys in lower case."""
    for key, value in tree.items():
        here = (*path, str(key).lower())
        if isinstance(value, dict):
            yield from leaves(value, here)
        else:
            yield here, value


def read_old(path: Path) -> dict:
    """The file with all it inherits, interpolations resolved; keys may be in either case."""
    merged: Any = OmegaConf.create({})
    for _, layer in layers(path):
        merged = OmegaConf.merge(merged, OmegaConf.create(layer))
    try:
        return cast(dict, OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        what = f"{path}: {error.full_key}: {first_line(error)}"
        raise UserError(
            f"{what}; write that key into the file (an image_size is in pixels, mostly 256), or a value in its place"
        ) from None


def import_config(arguments: list[str]) -> None:
    """`flperf import-config`: write the new file and say what changed."""
    parser = command_parser(
        "import-config",
        "Turn a FutureLatents configuration into one of ours, and say what changed.",
        "flperf import-config OLD.yaml --out configs/mine.yaml --processes 8",
    )
    parser.add_argument("old", metavar="OLD.yaml")
    parser.add_argument("--out", metavar="FILE", help="the new file (default: OLD.flperf.yaml beside it)")
    parser.add_argument(
        "--processes", type=int, default=1, help="how many devices the old file was run on (default: 1)"
    )
    options = parser.parse_args(arguments)
    old = Path(options.old)
    if not old.is_file():
        raise UserError(f"{old}: there is no such file")
    out = Path(options.out) if options.out else old.with_suffix(".flperf.yaml")
    make_folder_of(out)
    ours, said = translate(read_old(old), options.processes)
    tree = OmegaConf.create({})
    for key, value in ours.items():
        OmegaConf.update(tree, key, value, force_add=True)
    text = yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False)
    parse_config(text, str(out), ["name=imported"])  # what is written must load
    out.write_text(
        f"# From {old.name} of FutureLatents by `flperf import-config`.\n"
        + "".join(f"# {line}\n" for line in said)
        + text
    )
    print("\n".join([f"{out}: written", *(f"  {line}" for line in said)]))
