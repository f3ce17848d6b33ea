"""Models of transformers, from a hub name or a local folder, or with seeded random weights."""

import torch
from torch import nn

from flperf.config import Backbone
from flperf.errors import UserError


def load_transformer(model_class, config_class, backbone: Backbone, **geometry) -> nn.Module:
    """A transformers model from `backbone.weights`, or with seeded random weights from `backbone.architecture`. On the
    meta device only the configuration in `backbone.weights` is read."""
    if backbone.weights is None:
        # transformers silently accepts unknown arguments, so a misspelt one would mean the default.
        architecture = {key: value for key, value in backbone.architecture.items() if value is not None}
        for key in architecture.keys() - config_class().to_dict().keys():
            raise UserError(f"backbone.architecture.{key}: {config_class.__name__} has no such argument")
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return model_class(config_class(**{**architecture, **geometry}, attn_implementation="sdpa"))
        except (TypeError, ValueError) as error:
            raise UserError(f"backbone.architecture: {' '.join(str(error).split())}") from error
    try:
        if torch.get_default_device().type == "meta":
            return model_class(config_class.from_pretrained(backbone.weights, **geometry, attn_implementation="sdpa"))
        return model_class.from_pretrained(backbone.weights, **geometry, attn_implementation="sdpa")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"backbone.weights: {backbone.weights!r} is neither a local folder with a {backbone.kind} checkpoint "
            "nor a hub name that "
            f"can be reached ({reason}); download it, or set backbone.weights to the folder"
        ) from error
