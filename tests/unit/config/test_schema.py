"""The schema and the table of allowed numbers belong together."""

from omegaconf import OmegaConf

from flperf.config import Config
from flperf.config.validate import ALLOWED, check_values

TEXTS = {  # keys that are null by default and not numbers
    "backbone.weights",
    "dataset.train",
    "dataset.sources",
    "dataset.validation",
    "dataset.labels",
    "model.initial_weights",
}


def defaults(tree: dict, prefix: str = "") -> dict:
    """The default values by dotted key."""
    found = {}
    for name, value in tree.items():
        found |= defaults(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def test_every_number_has_a_range():
    values = defaults(OmegaConf.to_container(OmegaConf.structured(Config)))
    numbers = {
        key for key, value in values.items() if isinstance(value, int | float | list) and not isinstance(value, bool)
    }
    unset = {key for key, value in values.items() if value is None}
    assert numbers | unset - TEXTS == ALLOWED.keys()


def test_the_defaults_are_allowed():
    config = Config(name="own")
    config.trainer.max_steps = 1
    check_values(config, "own.yaml")
