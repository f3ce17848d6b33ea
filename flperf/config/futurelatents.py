"""The keys of FutureLatents, and what each is here: for `flperf import-config`, and for who writes an old key into
one of our files."""

from collections.abc import Callable
from typing import Any

from flperf.errors import UserError

PRECISIONS = {"no": "fp32", "false": "fp32", "fp16": "bf16", "bf16": "bf16"}  # YAML reads a bare `no` as false
UNCLIPPED = 1e9  # a gradient's norm that none has


def epochs(value: Any) -> str:
    return f"{value} epochs"


def known(table: dict, value: Any) -> Any:
    if value not in table:
        raise UserError(f"{value!r} is none of {', '.join(table)}")
    return table[value]


def recomputation(checkpointed: bool) -> str:
    return "full" if checkpointed else "none"


# Old key to ours, and how its value is turned into ours.
SAME = lambda value: value  # noqa: E731
TRANSLATED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "backbone_type": ("backbone.kind", SAME),
    "hf_repo": ("backbone.weights", SAME),
    "frame_stride": ("backbone.frame_stride", SAME),
    "n_frame": ("dataset.n_frames", SAME),
    "n_frames": ("dataset.n_frames", SAME),
    "stride": ("dataset.stride", SAME),
    "train_csv": ("dataset.train", SAME),
    "val_csv": ("dataset.validation", SAME),
    "labels_txt": ("dataset.labels", SAME),
    "path_col": ("dataset.out_path_column", SAME),
    "square_size": ("dataset.shapes.square_size", SAME),
    "square_init": ("dataset.shapes.square_init", SAME),
    "square_vel": ("dataset.shapes.square_vel", SAME),
    "disk_radius": ("dataset.shapes.disk_radius", SAME),
    "size": ("dataset.shapes.image_size", SAME),
    "num_workers": ("dataset.threads", SAME),
    "embedding_norm": ("latents.embedding_norm", lambda value: value or "none"),
    "normalize_embeddings": ("latents.embedding_norm", lambda value: "l2" if value else "none"),
    "num_context_latents": ("model.num_context_latents", SAME),
    "num_target_latents": ("model.num_target_latents", SAME),
    "hidden_dim": ("model.hidden_dim", SAME),
    "depth": ("model.depth", SAME),
    "num_heads": ("model.num_heads", SAME),
    "mlp_ratio": ("model.mlp_ratio", SAME),
    "gradient_checkpointing": ("model.activation_checkpointing", recomputation),
    "loss": ("objective.loss", SAME),
    "learning_rate": ("trainer.learning_rate", float),
    "weight_decay": ("trainer.weight_decay", float),
    "max_grad_norm": ("trainer.max_grad_norm", lambda value: UNCLIPPED if value is None else value),
    "epochs": ("trainer.max_epochs", SAME),
    "mixed_precision": ("engine.precision", lambda value: known(PRECISIONS, str(value).lower())),
    "eval_every": ("evaluation.eval_every", epochs),
    "eval_first": ("evaluation.eval_first", SAME),
    "save_every": ("checkpoint.save_every", epochs),
    "wandb": ("tracking.wandb", lambda value: "auto" if value else "none"),
    "seed": ("seed", SAME),
}
MEANT_NULL = ("embedding_norm", "max_grad_norm")  # null is a choice there; elsewhere it chooses nothing
# Old keys that have no counterpart, and why none is needed.
DROPPED = {
    "name": "which dataset it is stands in dataset.kind",
    "model_name": "backbone.weights names the model",
    "patch_size": "read from the backbone's weights",
    "input_dim": "the latents' width comes from the backbone",
    "num_train_timesteps": "tau is continuous",
    "find_unused_parameters": "every parameter of a head is used",
    "overfit_single_video": "point dataset.train to a CSV of one row",
    "overfit_video_path": "point dataset.train to a CSV of one row",
    "checkpoint_dir": "checkpoints lie in the run's folder",
    "device": "the launcher chooses it",
}
# Old keys that `flperf import-config` turns into ours together with others.
JOINED = {
    "model.type": "is model.head and objective.kind here",
    "batch_size_per_gpu": "is trainer.micro_batch_size here, and trainer.batch_size counts the clips of one update "
    "over all processes",
    "gradient_accumulation_steps": "follows from trainer.batch_size, trainer.micro_batch_size and the number of "
    "processes",
    "csv": "is dataset.train or dataset.validation here",
    "metadata": "is dataset.train or dataset.validation here",
    "image_size": "is backbone.processor here, and of drawn clips dataset.shapes.image_size",
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


def former_key(full_key: str) -> str | None:
    """What became of a dotted key of FutureLatents, as the end of a sentence; None if it was none. Where it stood may
    differ from version to version, what its last part means does not."""
    name = full_key.rpartition(".")[2]
    if full_key in SECTIONS:
        return "is a section of FutureLatents; `flperf import-config FILE` turns such a file into one of ours"
    if full_key in JOINED or name in JOINED:
        return JOINED.get(full_key) or JOINED[name]
    if name in TRANSLATED:
        return f"is {TRANSLATED[name][0]} here"
    return f"has no counterpart here: {DROPPED[name]}" if name in DROPPED else None
