"""`flperf import-config OLD.yaml`: a FutureLatents file as one of ours, and what could not be carried over.

Old files differ in nesting and in case from version to version (`TRAINER.N_FRAMES`, `trainer.training.loss`, `model.predictor.dit.depth`),
but a key's own name always meant the same. So sections are looked through, keys are found by name, and every key is either translated
or reported: none is dropped silently.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flperf.command import command_parser
from flperf.config import UserError, layers, parse_config
from flperf.former_keys import DROPPED, TRANSLATED

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
    "synthetic_bouncing_shapes_images": "bouncing_shapes",
    "syntheticbouncingshapes": "bouncing_shapes",
    "bouncing_shapes": "bouncing_shapes",
}
Changes = dict[str, Any]
NOTES = (
    "the context is encoded by itself; FutureLatents encodes the whole clip at once, which leaks: backbone.encode=joint does the same",
    "output layers start at zero; learning rate, betas and warm-up are the file's, constant as there: see trainer.* for better ones",
)


def translate(old: dict, processes: int) -> tuple[Changes, list[str]]:
    """Our keys (dotted) with values, and a line for everything that changed or went. Raises `UserError` for what can't be had."""
    ours: Changes = {"trainer.warmup_steps": 0, "trainer.schedule": "constant", "trainer.ema_decay": None, "trainer.betas": [0.9, 0.999]}
    said, per_device, accumulation = [], 1, 1
    for path, value in leaves(old):
        key, section = path[-1], path[:-1]
        match key:
            case "type" if section[-1:] == ("model",):
                ours["model.head"], ours["objective.kind"] = known(HEADS, value, path)
            case "batch_size_per_gpu" if "evaluation" in section:
                ours["evaluation.batch_size"] = value
            case "batch_size_per_gpu":
                per_device = value
            case "gradient_accumulation_steps":
                accumulation = value
            case "csv" | "metadata":
                split = "validation" if {"val", "validation"} & set(section) else "train"
                ours[f"dataset.{split}"] = value
            case "image_size":
                ours["backbone.processor"] = {"size": value, "crop_size": value}
            case "max_grad_value" if value is not None:
                raise UserError(f"{'.'.join(path)}: gradients are clipped by their norm; set max_grad_norm and remove this key")
            case "encoder_trainable" if value:
                raise UserError(f"{'.'.join(path)}: the encoder is always frozen")
            case "max_grad_value" | "encoder_trainable":
                pass
            case _ if key in TRANSLATED:
                target, turned = TRANSLATED[key]
                if value is not None or key == "embedding_norm":
                    ours[target] = turned(value)
                    if target.split(".")[-1] != key:
                        said.append(f"{'.'.join(path)}: is {target} here")
            case _ if key in DROPPED:
                said.append(f"{'.'.join(path)}: left out, {DROPPED[key]}")
            case _:
                raise UserError(
                    f"{'.'.join(path)}: is not a key of FutureLatents that flperf knows; remove it, or say what it should become"
                )
        kinds = [DATASETS[part] for part in path if part in DATASETS]
        if kinds:
            ours["dataset.kind"] = kinds[0]
    ours |= {"trainer.micro_batch_size": per_device, "trainer.batch_size": per_device * accumulation * processes}
    said.append(f"trainer.batch_size: {per_device} a device x {accumulation} accumulated x {processes} processes")
    return ours, [*said, *NOTES]


def known(table: dict, value: Any, path: tuple[str, ...]) -> Any:
    if value not in table:
        raise UserError(f"{'.'.join(path)}: {value!r} is none of {', '.join(table)}")
    return table[value]


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
        merged = OmegaConf.merge(merged, OmegaConf.create(lowered(layer)))
    try:
        return cast(dict, OmegaConf.to_container(merged, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def lowered(value: Any) -> Any:
    """Keys, and the names inside interpolations, in lower case."""
    if isinstance(value, dict):
        return {str(key).lower(): lowered(item) for key, item in value.items()}
    return value.lower() if isinstance(value, str) and value.startswith("${") else value


def import_config(arguments: list[str]) -> None:
    """`flperf import-config`: write the new file and say what changed."""
    parser = command_parser(
        "import-config",
        "Turn a FutureLatents configuration into one of ours, and say what changed.",
        "flperf import-config OLD.yaml --out configs/mine.yaml --processes 8",
    )
    parser.add_argument("old", metavar="OLD.yaml")
    parser.add_argument("--out", metavar="FILE", help="the new file (default: OLD.flperf.yaml beside it)")
    parser.add_argument("--processes", type=int, default=1, help="how many devices the old file was run on (default: 1)")
    options = parser.parse_args(arguments)
    old = Path(options.old)
    out = Path(options.out) if options.out else old.with_suffix(".flperf.yaml")
    ours, said = translate(read_old(old), options.processes)
    tree = OmegaConf.create({})
    for key, value in ours.items():
        OmegaConf.update(tree, key, value, force_add=True)
    text = yaml.safe_dump(OmegaConf.to_container(tree), sort_keys=False)
    parse_config(text, str(out), ["name=imported"])  # what is written must load
    out.write_text(f"# From {old.name} of FutureLatents by `flperf import-config`.\n" + "".join(f"# {line}\n" for line in said) + text)
    print("\n".join([f"{out}: written", *(f"  {line}" for line in said)]))
