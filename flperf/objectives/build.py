"""What a head is trained for, and how it then forecasts: regression in one pass, or flow matching.

Latents come in normalised; losses and noise are computed in fp32 whatever the latents' dtype. Noise and tau are pure
functions of (seed, sample), where `sample` is a clip's place in the endless order of training clips.
"""

import torch
from einops import repeat
from torch import Tensor, nn

from flperf.config import Config
from flperf.errors import UserError
from flperf.models.latents import LatentGeometry
from flperf.objectives.flow_matching import FlowMatching
from flperf.objectives.regression import Regression


def forecast(
    objective: Regression | FlowMatching, head: nn.Module, context: Tensor, sample: Tensor, frames: int | None = None
) -> Tensor:
    """fp32 `b k t h w d`: k samples (1 in regression) of what follows the normalised context `b t h w d`; sample:
    int64 [b].

    More frames than the head forecasts at once are rolled out: each sample goes on from its own last frames as context.
    """
    keys = sample[:, None] * objective.samples + torch.arange(objective.samples, device=sample.device)
    forecasts = objective.draw(head, context, keys)
    part = 0
    while frames is not None and forecasts.shape[2] < frames:
        part += 1
        past = torch.cat([repeat(context.float(), "b t h w d -> b k t h w d", k=keys.shape[1]), forecasts], dim=2)
        past = past[:, :, -context.shape[1] :].to(context.dtype)
        # Sample by sample, so that the batch keeps its shape and nothing is compiled again.
        following = [
            objective.draw(head, past[:, i].contiguous(), keys[:, i : i + 1], part) for i in range(keys.shape[1])
        ]
        forecasts = torch.cat([forecasts, torch.cat(following, dim=1)], dim=2)
    return forecasts[:, :, :frames]


OBJECTIVES: dict[str, type[Regression] | type[FlowMatching]] = {"regression": Regression, "flow_matching": FlowMatching}


def build_objective(config: Config, geometry: LatentGeometry) -> Regression | FlowMatching:
    """What the configuration trains for; raises `UserError` where its head can't be trained for that."""
    if config.objective.kind not in OBJECTIVES:
        raise UserError(f"objective.kind: {config.objective.kind!r} is unknown; known: {', '.join(OBJECTIVES)}")
    needs_dit = config.objective.kind == "flow_matching"
    if needs_dit != (config.model.head == "dit"):
        raise UserError(
            f"objective.kind {config.objective.kind!r} can't train model.head {config.model.head!r} (dit is for "
            "flow_matching)"
        )
    return OBJECTIVES[config.objective.kind](config, geometry)
