"""The scores of an evaluation as a table and as text."""

from flperf.evaluation.metrics import ERRORS
from flperf.evaluation.scores import Scores

FORECAST_LABELS = {
    "forecast": "forecast",
    "copy_last": "copy last",
    "mean": "mean latent",
    "median": "median latent",
    "ridge": "ridge",
}
ERROR_LABELS = {"l1": "L1", "mse": "MSE", "cosine": "1 - cos", "energy": "energy", "frechet": "Fréchet"}
SHOWN_FRAMES = 8  # columns of the horizon, at most


def table(scores: Scores) -> tuple[list[str], list[list[str | float]]]:
    """Column names and rows: for each forecast its label and its errors over all frames."""
    rows: list[list[str | float]] = [
        [label, *(scores.errors[name][error][-1].item() for error in ERROR_LABELS)]
        for name, label in FORECAST_LABELS.items()
    ]
    return ["forecast", *ERROR_LABELS.values()], rows


def summary(scores: Scores) -> str:
    """The errors over all frames and the skill at each frame ahead, as a few lines of text."""
    (_, *columns), errors = table(scores)
    skill = scores.skill("l1")[:-1].tolist()
    last = len(skill) - 1
    shown = sorted({round(i * last / (SHOWN_FRAMES - 1)) for i in range(SHOWN_FRAMES)})
    rows = [
        _row("", columns, ">9"),
        *(_row(str(label), values, "9.4f") for label, *values in errors),
        _row("skill", [scores.skill(error)[-1].item() for error in ERRORS], "9.1%"),
        _row("frames ahead", [f"+{frame + 1}" for frame in shown], ">9"),
        _row("skill (L1)", [skill[frame] for frame in shown], "9.1%"),
    ]
    if scores.samples > 1:
        one, best = (scores.errors[name]["l1"][-1].item() for name in ("sample", "best"))
        rows.append(
            f"{'samples':>14}  L1 of one {one:.4f}, of the best {best:.4f}; "
            f"spread / error {scores.spread()[-1].item():.2f} (1 is calibrated)"
        )
    return "\n".join(rows)


def _row(label: str, values: list, form: str) -> str:
    return f"{label:>14}" + "".join(format(value, form) for value in values)
