"""What the commands on a trained head share: their options, and the run that they load it into."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flperf.commands.common import add_overrides, command_parser
from flperf.config import Config, differences, dump_config, load_config
from flperf.engine.compile_cache import use_compile_cache
from flperf.errors import UserError

if TYPE_CHECKING:  # torch is loaded only after the arguments are parsed
    from flperf.forecaster import Trained
    from flperf.run import Run

# What another --config may change: none of it is part of the head or of its latents.
FREE_SECTIONS = {"dataset", "evaluation", "engine", "trainer", "tracking", "checkpoint", "name", "experiment"}


def trained_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser with the options --checkpoint and --weights."""
    parser = command_parser(command, description, *examples)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="folder of a run or of a checkpoint, or an exported file"
    )
    parser.add_argument(
        "--weights",
        choices=("average", "last"),
        default="average",
        help="the moving average of the weights (default) or the last ones",
    )
    return parser


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """The option --config and the overrides."""
    parser.add_argument(
        "--config", metavar="FILE", help="another configuration, for other data (default: that of the checkpoint)"
    )
    add_overrides(parser)


def trained_run(options: argparse.Namespace) -> tuple["Trained", "Run"]:
    """The head at `options.checkpoint`, and a run without an engine whose forecaster holds its weights.

    Raises `UserError` if the configuration does not fit the head.
    """
    _use_compile_cache_of(options.checkpoint)
    from flperf.engine.engine import load_weights
    from flperf.engine.process import start_process
    from flperf.forecaster import read_trained
    from flperf.run import build_components, evaluation_share

    trained = read_trained(options.checkpoint, average=options.weights == "average")
    config = trained.resolved(options.overrides)
    if options.config:
        config = _other_configuration(config, options)
    process = start_process()
    components = build_components(config, process, evaluation_share(config, process))
    if components.geometry != trained.geometry(config):
        raise UserError(
            f"{trained.source}: forecasts {trained.geometry(config)}, "
            f"but this configuration gives {components.geometry}"
        )
    load_weights(components.forecaster, trained.weights, components.dtype)
    statistics, baselines = trained.statistics.to(process.device), trained.baselines.to(process.device)
    return trained, components.with_statistics(statistics, baselines)


def _use_compile_cache_of(checkpoint: str) -> None:
    """Use the compile cache of the checkpoint's experiment; for an exported file that of the default experiment."""
    path = Path(checkpoint)
    run = path.parent.parent if path.name.startswith("step_") else path
    use_compile_cache(Config.experiment if path.is_file() else str(run.parent))


def _other_configuration(trained: Config, options: argparse.Namespace) -> Config:
    """The configuration of --config. Raises `UserError` if it differs from the head's outside `FREE_SECTIONS`."""
    import yaml

    config = load_config(options.config, options.overrides)
    old, new = (yaml.safe_load(dump_config(tree)) for tree in (trained, config))
    new["model"]["num_target_latents"] = old["model"]["num_target_latents"]  # checked with the geometry
    wrong = [line for line in differences(old, new) if line.split(":")[0].split(".")[0] not in FREE_SECTIONS]
    if wrong:
        raise UserError(
            f"{options.config}: differs from the configuration that {options.checkpoint} was trained with: "
            f"{'; '.join(wrong)}"
        )
    return config
