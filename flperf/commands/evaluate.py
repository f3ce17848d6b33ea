"""`flperf evaluate`: judge a trained head beside the baselines."""

from pathlib import Path

from flperf.commands.common import make_folder_of
from flperf.commands.trained import add_configuration, trained_parser, trained_run
from flperf.files import writing


def evaluate(arguments: list[str]) -> None:
    """`flperf evaluate`: print the comparison and append it to the run's metrics."""
    parser = trained_parser(
        "evaluate",
        "Judge a trained head on the validation clips, beside the baselines; with class labels by a linear probe, too.",
        "flperf evaluate --checkpoint experiment/demo",
        "deepspeed flperf/cli.py evaluate --checkpoint demo.safetensors --out results.jsonl "
        "dataset.validation=/data/k400/val.csv",
    )
    add_configuration(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="also append the result as a line of JSON (default: the run's metrics.jsonl)"
    )
    parser.add_argument(
        "--locator", metavar="FILE", help="of `flperf locator`: also say how far from the true ones shapes are forecast"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.out:  # before all the work, as a file that can't be written should show at once
        make_folder_of(options.out)
    trained, run = trained_run(options)
    from flperf.evaluation.evaluate import evaluate_run
    from flperf.evaluation.locator import PixelErrors, load_locator, locator_summary
    from flperf.evaluation.probe import PooledLatents, has_classes, probe_accuracies, probe_summary, training_features
    from flperf.evaluation.report import summary
    from flperf.training.tracking import cut_torn_line, json_line

    probed = run.config.evaluation.probe_clips > 0 and has_classes(run.dataset.splits["train"].labels)
    pooled = [PooledLatents()] if probed else []
    located = (
        [PixelErrors(load_locator(options.locator, run.config, run.process.device), run)] if options.locator else []
    )
    result = {"step": trained.step, "split": "val", "source": trained.source, **evaluate_run(run, pooled + located)}
    if probed:
        training, validation = training_features(run), pooled[0].gathered()
        if run.process.is_main:
            result["probe"] = probe_accuracies(training, validation)
    if located:
        result["locator"] = located[0].result()
    if run.process.is_main:
        print(
            f"{trained.source}, step {trained.step}, {result['clips']} clips; errors of normalised "
            f"latents:\n{summary(result)}"
        )
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


def _metrics_of(source: str) -> Path | None:
    """metrics.jsonl of the run that a checkpoint belongs to; an exported file has none."""
    checkpoint = Path(source)
    return checkpoint.parent.parent / "metrics.jsonl" if checkpoint.is_dir() else None
