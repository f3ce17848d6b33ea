"""The table of objectives by `objective.kind`, and forecasts with any of them.

An objective has `loss`, which trains a head, `draw`, which forecasts with it, and `samples`, the number of forecasts
per clip. A new one is a file in this folder and a line in the table. Latents are normalised. Losses and noise are
computed in fp32, whatever the dtype of the latents. Noise and tau depend only on the seed and `sample`, the index of
a clip in the endless order of training clips.
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
    """k forecasts (1 in regression) of the frames after the normalised context `b t h w d`: fp32 `b k t h w d`. sample:
    int64 [b].

    If more frames are asked for than the head forecasts at once, forecasts are rolled out: the last frames of each
    become its next context.
    """
    keys = sample[:, None] * objective.samples + torch.arange(objective.samples, device=sample.device)
    forecasts = objective.draw(head, context, keys)
    window = 0
    while frames is not None and forecasts.shape[2] < frames:
        window += 1
        past = torch.cat([repeat(context.float(), "b t h w d -> b k t h w d", k=keys.shape[1]), forecasts], dim=2)
        past = past[:, :, -context.shape[1] :].to(context.dtype)
        # One forecast of each clip at a time: the batch keeps its shape, so nothing is compiled again.
        following = [
            objective.draw(head, past[:, i].contiguous(), keys[:, i : i + 1], window) for i in range(keys.shape[1])
        ]
        forecasts = torch.cat([forecasts, torch.cat(following, dim=1)], dim=2)
    return forecasts[:, :, :frames]


OBJECTIVES: dict[str, type[Regression] | type[FlowMatching]] = {"regression": Regression, "flow_matching": FlowMatching}


def build_objective(config: Config, geometry: LatentGeometry) -> Regression | FlowMatching:
    """The configured objective. Raises `UserError` if it is unknown or can't train the configured head."""
    if config.objective.kind not in OBJECTIVES:
        raise UserError(f"objective.kind: {config.objective.kind!r} is unknown; known: {', '.join(OBJECTIVES)}")
    needs_dit = config.objective.kind == "flow_matching"
    if needs_dit != (config.model.head == "dit"):
        raise UserError(
            f"objective.kind {config.objective.kind!r} can't train model.head {config.model.head!r} (dit is for "
            "flow_matching)"
        )
    return OBJECTIVES[config.objective.kind](config, geometry)
