"""`flperf evaluate`: compare a trained head with the baselines."""

import argparse
from pathlib import Path

from flperf.commands.common import make_parent_folder
from flperf.commands.trained import add_configuration, trained_parser, trained_run
from flperf.files import writing


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = trained_parser(
        "evaluate",
        "Compare a trained head with the baselines on the validation clips; with class labels also by a linear probe.",
        "flperf evaluate --checkpoint experiment/demo",
        "deepspeed flperf/cli.py evaluate --checkpoint demo.safetensors --out results.jsonl "
        "dataset.validation=/data/k400/val.csv",
    )
    add_configuration(parser)
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="append the result to this file as a line of JSON (default: metrics.jsonl of the run)",
    )
    parser.add_argument(
        "--locator", metavar="FILE", help="written by `flperf locator`: also measure the error of the shapes' positions"
    )
    return parser.parse_intermixed_args(arguments)


def evaluate(arguments: list[str]) -> None:
    """Print the comparison and append it to the metrics of the run."""
    options = parse_arguments(arguments)
    if options.out:  # before the evaluation, which takes long
        make_parent_folder(options.out)
    trained, run = trained_run(options)
    from flperf.evaluation.evaluate import evaluate_run
    from flperf.evaluation.locator import PixelErrors, load_locator, locator_summary
    from flperf.evaluation.probe import PooledLatents, has_classes, probe_accuracies, probe_summary, training_features
    from flperf.evaluation.report import summary

    config, process = run.config, run.process
    probed = config.evaluation.probe_clips > 0 and has_classes(run.dataset.splits["train"].labels)
    pooled = [PooledLatents()] if probed else []
    located = [PixelErrors(load_locator(options.locator, config, process.device), run)] if options.locator else []
    scores = evaluate_run(run, pooled + located)
    result = {"step": trained.step, "split": "val", "source": trained.source, **scores.as_dict()}
    text = f"{trained.source}, step {trained.step}, {scores.clips} clips; errors of normalised latents:\n"
    text += summary(scores)
    if probed:
        training, validation = training_features(run), pooled[0].gathered()
        if process.is_main:
            result["probe"] = probe_accuracies(training, validation)
            text += "\n" + probe_summary(result["probe"])
    if located:
        result["locator"] = located[0].result()
        text += "\n" + locator_summary(result["locator"])
    if process.is_main:
        print(text)
        out = Path(options.out) if options.out else _metrics_file(trained.source)
        if out is not None:
            _append(out, result)
            print(f"appended to {out}")


def _metrics_file(source: str) -> Path | None:
    """metrics.jsonl of the run that a checkpoint belongs to; None for an exported file."""
    checkpoint = Path(source)
    return checkpoint.parent.parent / "metrics.jsonl" if checkpoint.is_dir() else None


def _append(path: Path, result: dict) -> None:
    from flperf.training.tracking import drop_incomplete_line, json_line

    with writing(path):
        drop_incomplete_line(path)
        with path.open("a") as lines:
            lines.write(json_line(result))
