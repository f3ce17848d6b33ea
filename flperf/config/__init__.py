"""The typed configuration: what the rest of the package reads of it."""

from flperf.config.load import (
    Backbone,
    Checkpoint,
    Config,
    Dataset,
    Engine,
    Evaluation,
    Latents,
    Model,
    Objective,
    Sampling,
    Shapes,
    Tracking,
    Trainer,
    differences,
    dump_config,
    load_config,
    parse_config,
)
from flperf.errors import UserError
