"""What the commands on a trained head have in common: `--checkpoint` takes a run's folder, one of its checkpoints or
an exported file."""

import argparse
from pathlib import Path

from flperf.commands.common import command_parser
from flperf.config import Config, differences, dump_config, load_config
from flperf.engine.compile_cache import use_compile_cache
from flperf.errors import UserError

# another --config may differ in these
DATA_SECTIONS = ("dataset", "evaluation", "engine", "trainer", "tracking", "checkpoint")
DATA_KEYS = ("name", "experiment")


def trained_parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    parser = command_parser(command, description, *examples)
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="a run's folder, a checkpoint's, or an exported file"
    )
    parser.add_argument(
        "--weights",
        choices=("average", "last"),
        default="average",
        help="the moving average (default) or the last ones",
    )
    return parser


def add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="another configuration, for other data (default: that of the checkpoint)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the configuration")


def trained_run(options: argparse.Namespace):
    """The head of `options.checkpoint` and a run without an engine that holds its weights and statistics."""
    _compile_beside(options.checkpoint)
    from flperf.engine.engine import load_weights
    from flperf.engine.process import start_process
    from flperf.forecaster import read_trained
    from flperf.run import build_run

    trained = read_trained(options.checkpoint, average=options.weights == "average")
    config = trained.resolved(options.overrides)
    if options.config:
        config = _other_data(config, options)
    process = start_process()
    run = build_run(config, process, training=False)
    if run.geometry != trained.geometry(config):
        raise UserError(
            f"{trained.source}: forecasts {trained.geometry(config)}, but this configuration gives {run.geometry}"
        )
    load_weights(run.forecaster, trained.weights, run.dtype)
    run.use_statistics(trained.statistics.to(process.device), trained.baselines.to(process.device))
    return trained, run


def _compile_beside(checkpoint: str) -> None:
    """Use the compiled code that training left in its experiment's folder; for an exported file the default one."""
    path = Path(checkpoint)
    run = path.parent.parent if path.name.startswith("step_") else path
    use_compile_cache(Config.experiment if path.is_file() else str(run.parent))


def _other_data(trained: Config, options: argparse.Namespace) -> Config:
    """Another configuration, which must agree with the head's in all that made it what it is."""
    import yaml

    config = load_config(options.config, options.overrides)
    old, new = (yaml.safe_load(dump_config(tree)) for tree in (trained, config))
    new["model"]["num_target_latents"] = old["model"]["num_target_latents"]  # checked with the geometry
    wrong = [
        line for line in differences(old, new) if line.split(":")[0].split(".")[0] not in (*DATA_SECTIONS, *DATA_KEYS)
    ]
    if wrong:
        raise UserError(f"{options.config}: the head of {options.checkpoint} was trained otherwise: {'; '.join(wrong)}")
    return config
