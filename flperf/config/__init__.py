"""The typed configuration: its dataclasses, and functions to load, write and compare it."""

from flperf.config.load import differences, dump_config, load_config, parse_config
from flperf.config.schema import (
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
    Source,
    Tracking,
    Trainer,
)
from flperf.errors import UserError
