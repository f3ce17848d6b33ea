"""Configurations of FutureLatents: its keys, and how they are translated.

`flperf import-config` translates a whole file. Where a file or the command line uses one of the old keys, the error
message names the new one.

Old files differ in nesting and case from version to version (`TRAINER.N_FRAMES`, `trainer.training.loss`,
`model.predictor.dit.depth`), but the last part of a key always had the same meaning. So keys are found by their last
part in any section. Each key is translated or reported; none is dropped silently.
"""

from collections.abc import Callable, Iterator
from typing import Any

from flperf.errors import UserError

PRECISIONS = {"no": "fp32", "false": "fp32", "fp16": "bf16", "bf16": "bf16"}  # YAML reads a bare `no` as false
HEADS = {  # by model.type: model.head and objective.kind
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
NO_CLIPPING = 1e9  # a gradient norm that is never reached


def lookup(table: dict, value: Any) -> Any:
    """The entry of a table. Raises `UserError` that lists the keys."""
    if value not in table:
        raise UserError(f"{value!r} is none of {', '.join(table)}")
    return table[value]


def unchanged(value: Any) -> Any:
    return value


def epochs(value: Any) -> str:
    return f"{value} epochs"


def checkpointing_mode(checkpointed: bool) -> str:
    """model.activation_checkpointing for a boolean, as FutureLatents and version 0.1.0 of flperf have it."""
    return "full" if checkpointed else "none"


# By old key: the new key, and the function that translates the value.
Translation = tuple[str, Callable[[Any], Any]]
TRANSLATED: dict[str, Translation] = {
    "backbone_type": ("backbone.kind", unchanged),
    "hf_repo": ("backbone.weights", unchanged),
    "frame_stride": ("backbone.frame_stride", unchanged),
    "n_frame": ("dataset.n_frames", unchanged),
    "n_frames": ("dataset.n_frames", unchanged),
    "stride": ("dataset.stride", unchanged),
    "train_csv": ("dataset.train", unchanged),
    "val_csv": ("dataset.validation", unchanged),
    "labels_txt": ("dataset.labels", unchanged),
    "path_col": ("dataset.out_path_column", unchanged),
    "square_size": ("dataset.shapes.square_size", unchanged),
    "square_init": ("dataset.shapes.square_init", unchanged),
    "square_vel": ("dataset.shapes.square_vel", unchanged),
    "disk_radius": ("dataset.shapes.disk_radius", unchanged),
    "size": ("dataset.shapes.image_size", unchanged),
    "num_workers": ("dataset.threads", unchanged),
    "embedding_norm": ("latents.embedding_norm", lambda value: value or "none"),
    "normalize_embeddings": ("latents.embedding_norm", lambda value: "l2" if value else "none"),
    "num_context_latents": ("model.num_context_latents", unchanged),
    "num_target_latents": ("model.num_target_latents", unchanged),
    "hidden_dim": ("model.hidden_dim", unchanged),
    "depth": ("model.depth", unchanged),
    "num_heads": ("model.num_heads", unchanged),
    "mlp_ratio": ("model.mlp_ratio", unchanged),
    "gradient_checkpointing": ("model.activation_checkpointing", checkpointing_mode),
    "loss": ("objective.loss", unchanged),
    "learning_rate": ("trainer.learning_rate", float),
    "weight_decay": ("trainer.weight_decay", float),
    "max_grad_norm": ("trainer.max_grad_norm", lambda value: NO_CLIPPING if value is None else value),
    "epochs": ("trainer.max_epochs", unchanged),
    "mixed_precision": ("engine.precision", lambda value: lookup(PRECISIONS, str(value).lower())),
    "eval_every": ("evaluation.eval_every", epochs),
    "eval_first": ("evaluation.eval_first", unchanged),
    "save_every": ("checkpoint.save_every", epochs),
    "wandb": ("tracking.wandb", lambda value: "auto" if value else "none"),
    "seed": ("seed", unchanged),
}
NULL_IS_A_VALUE = ("embedding_norm", "max_grad_norm")  # any other key that is null counts as not set
# Old keys without a new one, and why.
DROPPED = {
    "name": "the dataset is named by dataset.kind",
    "model_name": "backbone.weights names the model",
    "patch_size": "read from the backbone's weights",
    "input_dim": "the latents' width comes from the backbone",
    "num_train_timesteps": "tau is continuous",
    "find_unused_parameters": "every parameter of a head is used",
    "overfit_single_video": "point dataset.train to a CSV of one row",
    "overfit_video_path": "point dataset.train to a CSV of one row",
    "checkpoint_dir": "checkpoints are in the run's folder",
    "device": "the launcher chooses it",
}
# Old keys that are translated together with others or depend on their section; for the error messages.
CONTEXTUAL = {
    "model.type": "is model.head and objective.kind here",
    "batch_size_per_gpu": "is trainer.micro_batch_size here, and trainer.batch_size counts the clips of one update "
    "over all processes",
    "gradient_accumulation_steps": "follows from trainer.batch_size, trainer.micro_batch_size and the number of "
    "processes",
    "csv": "is dataset.train or dataset.validation here",
    "metadata": "is dataset.train or dataset.validation here",
    "image_size": "is backbone.processor here, and dataset.shapes.image_size for bouncing shapes",
    "max_grad_value": "gradients are clipped by their norm: trainer.max_grad_norm",
    "encoder_trainable": "the encoder is always frozen",
}
SECTIONS = {
    "datasets",
    "trainer.training",
    "trainer.evaluation",
    "model.dit",
    "model.predictor",
    "model.flow_matching",
    "dataset.paths",
}

Changes = dict[str, Any]  # values by new key
# What FutureLatents does by default and flperf does not.
OLD_DEFAULTS: Changes = {
    "trainer.warmup_steps": 0,
    "trainer.schedule": "constant",
    "trainer.ema_decay": None,
    "trainer.betas": [0.9, 0.999],
}
OLD_SHAPES_DEFAULTS: Changes = {"dataset.stride": 1, "dataset.start": "first", "dataset.validation_start": "first"}
NOTES = (
    "the context is encoded separately; FutureLatents encodes the whole clip at once, which leaks the future into the "
    "context: backbone.encode=joint does the same",
    "output layers are initialised to zero; learning rate, betas and warm-up are those of the old file, and the "
    "schedule is constant as in FutureLatents: see trainer.* for better values",
)


def convert_booleans(layer: dict) -> None:
    """Translate a boolean model.activation_checkpointing, as version 0.1.0 of flperf wrote it, in place."""
    model = layer.get("model")
    if isinstance(model, dict) and isinstance(model.get("activation_checkpointing"), bool):
        model["activation_checkpointing"] = checkpointing_mode(model["activation_checkpointing"])


def former_key(key: str) -> str | None:
    """What became of an old dotted key, as the end of a sentence; None if FutureLatents has no such key."""
    name = key.rpartition(".")[2]
    if key in SECTIONS:
        return "is a section of FutureLatents; `flperf import-config FILE` converts such a file"
    if key in CONTEXTUAL or name in CONTEXTUAL:
        return CONTEXTUAL.get(key) or CONTEXTUAL[name]
    if name in TRANSLATED:
        return f"is {TRANSLATED[name][0]} here"
    return f"has no counterpart here: {DROPPED[name]}" if name in DROPPED else None


def translate(old: dict, processes: int) -> tuple[Changes, list[str]]:
    """Translate an old configuration that was run on `processes` devices.

    Returns the values by new key, and a line for every key that is renamed, changed or dropped. Raises `UserError` for
    a setting that flperf doesn't have.
    """
    kind = dataset_kind(old.get("datasets") or {})
    found: Changes = {}
    report: list[str] = []
    for path, value in leaves(old):
        name = ".".join(path)
        try:
            changes, note = translate_value(path, value)
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{name}: {error}") from None
        clash = next((key for key, new in changes.items() if found.get(key, new) != new), None)
        if clash:  # such as another stride for validation than for training
            report.append(f"{name}: dropped, {value!r}, since {clash} is already {found[clash]!r}")
            continue
        found |= changes
        report += [f"{name}: {note}"] if note else []
    per_device, accumulation = found.setdefault("trainer.micro_batch_size", 1), found.pop("accumulation", 1)
    report.append(f"trainer.batch_size: {per_device} per device x {accumulation} accumulated x {processes} processes")
    new = OLD_DEFAULTS | {"trainer.batch_size": per_device * accumulation * processes}
    if kind == "bouncing_shapes":
        new |= OLD_SHAPES_DEFAULTS
    else:  # shapes that were drawn for visualisation only
        found = {key: value for key, value in found.items() if not key.startswith("dataset.shapes.")}
    return new | ({"dataset.kind": kind} if kind else {}) | found, [*report, *NOTES]


def translate_value(path: tuple[str, ...], value: Any) -> tuple[Changes, str | None]:
    """New keys and values for one old value, and a note where more than its section changes."""
    key, section = path[-1], path[:-1]
    if "visualisation" in section and key != "length":
        return {}, None  # visualised clips are like those of the other splits
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
            return {}, f"dropped, {DROPPED[key]}"
    target, convert = translation_by_section(key, section) or TRANSLATED.get(key) or (None, unchanged)
    if value is None and key not in NULL_IS_A_VALUE:
        return {}, None
    if target is None:
        raise UserError("is not a known key of FutureLatents; remove it, or replace it by one of flperf")
    new = convert(value)
    becomes = "" if new == value or convert is float else f", {value!r} becomes {new!r}"
    return {target: new}, f"is {target} here{becomes}" if becomes or target.split(".")[-1] != key else None


def translation_by_section(key: str, section: tuple[str, ...]) -> Translation | None:
    """The translation of a key whose meaning depends on its section; None for any other key."""
    split = next((SPLITS[part] for part in section if part in SPLITS), "train")
    match key:
        case "csv" | "metadata":
            return f"dataset.{split}", unchanged
        case "length":
            return f"dataset.shapes.{split}_clips", unchanged
        case "batch_size_per_gpu":
            return "evaluation.batch_size" if "evaluation" in section else "trainer.micro_batch_size", unchanged
        case "image_size" if "datasets" in section:
            return "dataset.shapes.image_size", unchanged
        case "image_size":
            return "backbone.processor", lambda value: {"size": value, "crop_size": value}
    return None


def head_and_objective(model: str) -> tuple[str, str]:
    if model == "locator":
        raise UserError("a locator is trained without such a file: see `flperf locator --help`")
    return lookup(HEADS, model)


def dataset_kind(datasets: dict) -> str | None:
    """dataset.kind of the training split, or of all splits if the file does not distinguish them; None if there is no
    dataset. Raises `UserError` for several or an unknown one."""
    train = datasets.get("train") or {key: value for key, value in datasets.items() if key not in SPLITS}
    names = [train["name"]] if "name" in train else [key for key in train if key in DATASETS]
    if len(names) > 1:
        raise UserError(f"datasets: has {' and '.join(names)}; keep only the one to train on")
    try:
        return lookup(DATASETS, names[0]) if names else None
    except UserError as error:
        raise UserError(f"datasets.train.name: {error}") from None


def leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every value that is not a mapping. Keys become lower case."""
    for key, value in tree.items():
        here = (*path, str(key).lower())
        if isinstance(value, dict):
            yield from leaves(value, here)
        else:
            yield here, value
