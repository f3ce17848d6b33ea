"""`flperf train`, also started as `deepspeed flperf/train.py`: trains a head."""

import argparse
import time

from flperf.commands.common import command_parser, run_command
from flperf.config import Config, dump_config, load_config
from flperf.engine.compile_cache import use_compile_cache


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "train",
        "Train a head on one process; under the deepspeed launcher (deepspeed flperf/train.py …) on all "
        "devices. The same command resumes.",
        "flperf train --config configs/demo.yaml",
        "deepspeed flperf/train.py --config configs/references/vjepa2_kinetics_400.yaml "
        "dataset.train=/data/k400/train.csv",
        debug="a few clips and steps, tracebacks, no dashboards; writes experiment/debug/",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file")
    parser.add_argument("--overwrite", action="store_true", help="rename an earlier run of this name and start over")
    parser.add_argument(
        "--dry-run", action="store_true", help="build everything and print its sizes; take no step, write no run"
    )
    parser.add_argument(
        "--profile", action="store_true", help="profile a few steps: a table of where the time goes, and a trace"
    )
    # Passed by the launcher, which also sets it in the environment.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_intermixed_args(arguments)


def shrink(config: Config) -> None:
    """For --debug: tiny subsets and budgets, and no dashboards."""
    config.dataset.limit = min(config.dataset.limit or 32, 32)
    config.trainer.max_steps, config.trainer.max_epochs, config.trainer.warmup_steps = 10, None, 2
    config.latents.statistics_clips = min(config.latents.statistics_clips, 16)
    config.evaluation.max_clips, config.tracking.log_every = 8, 1
    config.tracking.wandb, config.tracking.tensorboard = "none", False


def train(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides)
    if options.debug:
        shrink(config)
    use_compile_cache(config.experiment)

    # Imported late, so that a mistake in the configuration shows at once.
    from flperf.engine.preemption import catch_stop_signals
    from flperf.engine.process import batch_share, start_process
    from flperf.engine.watchdog import Watchdog
    from flperf.estimate.describe import describe
    from flperf.run import build_components, build_training_engine
    from flperf.training import loop
    from flperf.training.dashboards import check_dashboards
    from flperf.training.run_folder import RunFolder

    check_dashboards(config)
    started = time.perf_counter()
    catch_stop_signals()
    process = start_process(config.engine.timeout)
    with Watchdog(process, config.engine.timeout):
        folder = RunFolder(config, options.debug)
        if not (options.overwrite or options.dry_run):
            folder.check(config)
        components = build_components(config, process, batch_share(config.trainer, process))
        engine = build_training_engine(components)
        if process.is_main:
            print((dump_config(config) if options.dry_run else "") + describe(components), flush=True)
        if options.dry_run:
            return
        folder.open(config, process, components.dataset, overwrite=options.overwrite)
        loop.train(components, engine, folder, profiled=options.profile)
    if process.is_main:
        print(f"  {time.perf_counter() - started:.0f} s in all")


def main(arguments: list[str] | None = None) -> None:
    run_command(train, arguments)


if __name__ == "__main__":
    main()
