"""Checks what types can't express: the range of each number, and which keys fit together. What depends on the data or
the weights is checked where they are opened."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flperf.errors import UserError

if TYPE_CHECKING:
    from flperf.config.schema import Config, Dataset


@dataclass(frozen=True)
class Allowed:
    """The allowed numbers of a key; for a list, `count` of them."""

    text: str
    holds: Callable[[float], bool]
    count: int | None = None

    def __contains__(self, value: Any) -> bool:
        values = [value] if self.count is None else value
        return len(values) == (self.count or 1) and all(
            math.isfinite(number) and self.holds(number) for number in values
        )


AT_LEAST_0 = Allowed("at least 0", lambda number: number >= 0)
AT_LEAST_1 = Allowed("at least 1", lambda number: number >= 1)
ABOVE_0 = Allowed("above 0", lambda number: number > 0)
BELOW_1 = Allowed("in [0, 1)", lambda number: 0 <= number < 1)
FINITE = Allowed("a finite number", lambda number: True)

# For every key that is a number. null means "not set" and is allowed where the type permits it.
ALLOWED: dict[str, Allowed] = {
    "seed": AT_LEAST_0,
    "backbone.frame_stride": AT_LEAST_1,
    "dataset.n_frames": AT_LEAST_1,
    "dataset.stride": AT_LEAST_1,
    "dataset.fps": ABOVE_0,
    "dataset.threads": AT_LEAST_1,
    "dataset.prefetch": AT_LEAST_1,
    "dataset.limit": AT_LEAST_1,
    "dataset.shapes.train_clips": AT_LEAST_1,
    "dataset.shapes.validation_clips": AT_LEAST_0,
    "dataset.shapes.visualisation_clips": AT_LEAST_0,
    "dataset.shapes.image_size": AT_LEAST_1,
    "dataset.shapes.square_size": AT_LEAST_1,
    "dataset.shapes.square_init": Allowed("two finite numbers", FINITE.holds, count=2),
    "dataset.shapes.square_vel": Allowed("two finite numbers", FINITE.holds, count=2),
    "dataset.shapes.disk_radius": AT_LEAST_1,
    "dataset.shapes.splice_at": AT_LEAST_0,
    "latents.statistics_clips": AT_LEAST_1,
    "model.num_context_latents": AT_LEAST_1,
    "model.num_target_latents": AT_LEAST_1,
    "model.hidden_dim": AT_LEAST_1,
    "model.depth": AT_LEAST_1,
    "model.num_heads": AT_LEAST_1,
    "model.mlp_ratio": ABOVE_0,
    "objective.tau_mean": FINITE,
    "objective.tau_std": AT_LEAST_0,
    "objective.tau_shift": ABOVE_0,
    "objective.context_dropout": BELOW_1,
    "trainer.batch_size": AT_LEAST_1,
    "trainer.micro_batch_size": AT_LEAST_1,
    "trainer.max_steps": AT_LEAST_1,
    "trainer.max_epochs": ABOVE_0,
    "trainer.stop_after": AT_LEAST_1,
    "trainer.learning_rate": AT_LEAST_0,
    "trainer.weight_decay": AT_LEAST_0,
    "trainer.betas": Allowed("two numbers in [0, 1)", BELOW_1.holds, count=2),
    "trainer.warmup_steps": AT_LEAST_0,
    "trainer.final_learning_rate": AT_LEAST_0,
    "trainer.max_grad_norm": ABOVE_0,
    "trainer.ema_decay": BELOW_1,
    "trainer.max_skipped_updates": AT_LEAST_1,
    "engine.zero_stage": Allowed("0, 1, 2 or 3", lambda number: number in (0, 1, 2, 3)),
    "engine.timeout": AT_LEAST_1,
    "evaluation.max_clips": AT_LEAST_1,
    "evaluation.batch_size": AT_LEAST_1,
    "evaluation.sampling.steps": AT_LEAST_1,
    "evaluation.sampling.shift": ABOVE_0,
    "evaluation.sampling.tolerance": ABOVE_0,
    "evaluation.sampling.samples": AT_LEAST_1,
    "evaluation.sampling.guidance": AT_LEAST_0,
    "evaluation.sampling.guidance_interval": Allowed(
        "two ascending numbers in [0, 1]", lambda number: 0 <= number <= 1, count=2
    ),
    "evaluation.dump_examples": AT_LEAST_0,
    "evaluation.probe_clips": AT_LEAST_0,
    "checkpoint.keep": AT_LEAST_1,
    "tracking.log_every": AT_LEAST_1,
}
WITHOUT_SOURCES = {"demo", "bouncing_shapes"}  # kinds of datasets that have their own clips
RESERVED_NAMES = {"compile_cache", "debug"}  # other folders in `experiment`


def check_values(config: "Config", source: str) -> None:
    """Raise `UserError` for a value that is not allowed: one line that names `source`, the key, its value and the
    allowed ones."""
    for key, allowed in ALLOWED.items():
        value = attrgetter(key)(config)
        if value is not None and value not in allowed:
            raise UserError(f"{source}: {key}: must be {allowed.text}, is {value}")
    for key in ("evaluation.eval_every", "checkpoint.save_every"):
        parse_interval(attrgetter(key)(config), f"{source}: {key}")
    if Path(config.name).name != config.name or config.name in {"", ".."} | RESERVED_NAMES:
        raise UserError(
            f"{source}: name: must be the name of a folder, not a path, and neither "
            f"{' nor '.join(sorted(RESERVED_NAMES))}; is {config.name!r}"
        )
    _check_sources(config.dataset, source)
    _check_together(config, source)


def _check_sources(dataset: "Dataset", source: str) -> None:
    for number, each in enumerate(dataset.sources or []):
        if each.weight not in ABOVE_0:
            raise UserError(
                f"{source}: dataset.sources[{number}].weight: must be {ABOVE_0.text} and finite, is {each.weight}"
            )
    if dataset.sources and dataset.train is not None:
        raise UserError(
            f"{source}: dataset.sources and dataset.train are both set; set the one that is not meant to null"
        )
    if dataset.sources and dataset.kind in WITHOUT_SOURCES:
        raise UserError(f"{source}: dataset.sources: dataset.kind {dataset.kind!r} has its own clips; set it to null")


def _check_together(config: "Config", source: str) -> None:
    trainer, model, objective, sampling = config.trainer, config.model, config.objective, config.evaluation.sampling
    if (trainer.max_steps is None) == (trainer.max_epochs is None):
        raise UserError(f"{source}: set exactly one of trainer.max_steps and trainer.max_epochs")
    rotary = model.positions == "rope3d"  # rotates pairs of channels
    if model.hidden_dim % (model.num_heads * (2 if rotary else 1)):
        multiple = "an even multiple" if rotary else "a multiple"
        raise UserError(
            f"{source}: model.hidden_dim: must be {multiple} of model.num_heads {model.num_heads}, is "
            f"{model.hidden_dim}"
        )
    if sampling.guidance_interval != sorted(sampling.guidance_interval):
        raise UserError(
            f"{source}: evaluation.sampling.guidance_interval: must be two ascending numbers in [0, 1], is "
            f"{sampling.guidance_interval}"
        )
    if sampling.guidance != 1 and objective.context_dropout == 0:
        raise UserError(
            f"{source}: evaluation.sampling.guidance: needs objective.context_dropout above 0 in training, such as 0.1"
        )
    if config.dataset.fps and config.dataset.kind == "bouncing_shapes":
        raise UserError(
            f"{source}: dataset.fps: frames of bouncing_shapes have no time; set it to null and use dataset.stride"
        )
    if objective.kind == "flow_matching" and objective.loss == "cosine":
        raise UserError(f"{source}: objective.loss: cosine is not defined for flow matching; use mse, l1 or smooth_l1")


def parse_interval(text: str, key: str) -> tuple[float, Literal["step", "epoch"]]:
    """Parse an interval: "500" or "500 steps" is (500, "step"), "2 epochs" is (2, "epoch"). Raises `UserError`, which
    names `key`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?)?\s*", str(text))
    if not match or float(match[1]) <= 0:
        raise UserError(f"{key}: {text!r} is not a number of steps or epochs (write 500 or '1 epoch')")
    return float(match[1]), "epoch" if (match[2] or "step").startswith("epoch") else "step"
