"""`flperf evaluate`, `sample`, `export` and `locator`: what is done with a trained head, and what judges it.

The first three take a run's folder, one of its checkpoints or an exported file. `evaluate` runs on any number of processes
(`deepspeed flperf/cli.py evaluate …`).
"""

import argparse
from pathlib import Path

from flperf.commands.common import command_parser, make_folder_of
from flperf.config import Config, differences, dump_config, load_config
from flperf.engine.compile_cache import use_compile_cache
from flperf.errors import UserError
from flperf.files import writing

DATA_SECTIONS = ("dataset", "evaluation", "engine", "trainer", "tracking", "checkpoint")  # another --config may differ in these
DATA_KEYS = ("name", "experiment")


def _parser(command: str, description: str, *examples: str) -> argparse.ArgumentParser:
    parser = command_parser(command, description, *examples)
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a run's folder, a checkpoint's, or an exported file")
    parser.add_argument("--weights", choices=("average", "last"), default="average", help="the moving average (default) or the last ones")
    return parser


def _add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="another configuration, for other data (default: that of the checkpoint)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the configuration")


def export(arguments: list[str]) -> None:
    """`flperf export`: one safetensors file for `load_forecaster`."""
    parser = _parser(
        "export",
        "Write a trained head (its moving average), its statistics and its configuration as one safetensors file.",
        "flperf export --checkpoint experiment/demo --out demo.safetensors",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="such as forecaster.safetensors")
    options = parser.parse_args(arguments)
    from flperf.forecaster import read_trained, write_export

    trained = read_trained(options.checkpoint, average=options.weights == "average")
    write_export(trained, options.out)
    parameters = sum(tensor.numel() for tensor in trained.weights.values())
    print(f"{options.out}: the head of {trained.source} after {trained.step} steps, {parameters / 1e6:.1f} M parameters")


def evaluate(arguments: list[str]) -> None:
    """`flperf evaluate`: print the comparison and append it to the run's metrics."""
    parser = _parser(
        "evaluate",
        "Judge a trained head on the validation clips, beside the trivial forecasts; with class labels by a linear probe, too.",
        "flperf evaluate --checkpoint experiment/demo",
        "deepspeed flperf/cli.py evaluate --checkpoint demo.safetensors --out results.jsonl dataset.validation=/data/k400/val.csv",
    )
    _add_configuration(parser)
    parser.add_argument("--out", metavar="FILE", help="also append the result as a line of JSON (default: the run's metrics.jsonl)")
    parser.add_argument("--locator", metavar="FILE", help="of `flperf locator`: also say how far from the true ones shapes are forecast")
    options = parser.parse_intermixed_args(arguments)
    if options.out:  # before all the work, as a file that can't be written should show at once
        make_folder_of(options.out)
    trained, run = _trained_run(options)
    from flperf.evaluation.evaluate import evaluate_run
    from flperf.evaluation.locator import PixelErrors, load_locator, locator_summary
    from flperf.evaluation.probe import Pooled, has_classes, probe_accuracies, probe_summary, training_features
    from flperf.evaluation.report import summary
    from flperf.training.tracking import cut_torn_line, json_line

    probed = run.config.evaluation.probe_clips > 0 and has_classes(run.dataset.splits["train"].labels)
    pooled = [Pooled()] if probed else []
    located = [PixelErrors(load_locator(options.locator, run.config, run.process.device), run)] if options.locator else []
    result = {"step": trained.step, "split": "val", "source": trained.source, **evaluate_run(run, pooled + located)}
    if probed:
        training, validation = training_features(run), pooled[0].gathered()
        if run.process.is_main:
            result["probe"] = probe_accuracies(training, validation)
    if located:
        result["locator"] = located[0].result()
    if run.process.is_main:
        print(f"{trained.source}, step {trained.step}, {result['clips']} clips; errors of normalised latents:\n{summary(result)}")
        if probed:
            print(probe_summary(result["probe"]))
        if located:
            print(locator_summary(result["locator"]))
        path = Path(options.out) if options.out else _metrics_of(trained.source)
        if path is not None:
            with writing(path):
                cut_torn_line(path)
                with path.open("a") as lines:
                    lines.write(json_line(result))
            print(f"appended to {path}")


def sample(arguments: list[str]) -> None:
    """`flperf sample`: forecasts of validation clips as files."""
    parser = _parser(
        "sample",
        "Write forecasts of validation clips: OUT/forecasts.safetensors, and a folder of pictures and tensors for each clip.",
        "flperf sample --checkpoint experiment/demo --out experiment/demo/forecasts --clips 4 --seconds 2",
    )
    _add_configuration(parser)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--clips", type=int, default=4, help="the first so many validation clips (default: 4)")
    horizon = parser.add_mutually_exclusive_group()
    horizon.add_argument("--frames", type=int, help="latent frames ahead (default: as in training; more are rolled out)")
    horizon.add_argument("--seconds", type=float, help="the same as a time, by the clips' frame rate")
    options = parser.parse_intermixed_args(arguments)
    for name in ("clips", "frames", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name}: must be above 0, is {value}")
    _, run = _trained_run(options)
    from flperf.commands.forecast_files import write_forecasts

    print(write_forecasts(run, Path(options.out), options.clips, options.frames, options.seconds))


def locator(arguments: list[str]) -> None:
    """`flperf locator`: one safetensors file for `evaluate --locator`."""
    parser = command_parser(
        "locator",
        "Train a head that finds the bouncing shapes in latents, for `flperf evaluate --locator`.",
        "flperf locator --config configs/shapes/predictor.yaml --out experiment/locator.safetensors",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="whose encoder and bouncing shapes are taken")
    parser.add_argument("--out", required=True, metavar="FILE", help="such as locator.safetensors")
    parser.add_argument("--head", default="coordinates", help="coordinates (default): regression; heatmap: the likeliest patches")
    parser.add_argument("--steps", type=int, default=600, help="updates of 32 clips (default: 600)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the configuration")
    options = parser.parse_intermixed_args(arguments)
    make_folder_of(options.out)
    config = load_config(options.config, options.overrides)
    use_compile_cache(config.experiment)
    import torch

    from flperf.evaluation.locator import save_locator, train_locator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, error = train_locator(config, options.head, options.steps, device)
    save_locator(Path(options.out), trained, config)
    print(f"{options.out}: finds the shapes in held-out clips to {error:.2f} pixels of {config.dataset.shapes.image_size}")


def _trained_run(options: argparse.Namespace):
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
    if run.layout != trained.layout(config):
        raise UserError(f"{trained.source}: forecasts {trained.layout(config)}, but this configuration gives {run.layout}")
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
    new["model"]["num_target_latents"] = old["model"]["num_target_latents"]  # checked with the layout
    wrong = [line for line in differences(old, new) if line.split(":")[0].split(".")[0] not in (*DATA_SECTIONS, *DATA_KEYS)]
    if wrong:
        raise UserError(f"{options.config}: the head of {options.checkpoint} was trained otherwise: {'; '.join(wrong)}")
    return config


def _metrics_of(source: str) -> Path | None:
    """metrics.jsonl of the run that a checkpoint belongs to; an exported file has none."""
    checkpoint = Path(source)
    return checkpoint.parent.parent / "metrics.jsonl" if checkpoint.is_dir() else None
