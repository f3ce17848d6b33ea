"""An evaluation's result as a table and as text."""

from flperf.evaluation.metrics import ERRORS

NAMES = {
    "forecast": "forecast",
    "copy_last": "copy last",
    "mean": "mean latent",
    "median": "median latent",
    "ridge": "ridge",
}

COLUMNS = {"l1": "L1", "mse": "MSE", "cosine": "1 - cos", "energy": "energy", "frechet": "Fréchet"}


def table(result: dict) -> tuple[list[str], list[list[str | float]]]:
    """The comparison as column names and rows: one row a forecast, errors over all frames."""
    rows: list[list[str | float]] = [
        [label, *(result[f"{name}_{error}"] for error in COLUMNS)] for name, label in NAMES.items()
    ]
    return ["forecast", *COLUMNS.values()], rows


def summary(result: dict) -> str:
    """The comparison as a few lines of text: errors over all frames, then the skill of each frame ahead."""
    (_, *columns), errors = table(result)
    rows = ["".join([f"{'':>14}", *(f"{column:>9}" for column in columns)])]
    rows += ["".join([f"{label:>14}", *(f"{value:9.4f}" for value in values)]) for label, *values in errors]
    rows.append("".join([f"{'skill':>14}", *(f"{result[f'skill_{error}']:9.1%}" for error in ERRORS)]))
    ahead = result["horizon"]["skill_l1"]
    shown = sorted({round(i * (len(ahead) - 1) / 7) for i in range(8)}) if len(ahead) > 1 else [0]
    rows.append(f"{'frames ahead':>14}" + "".join(f"{f'+{frame + 1}':>9}" for frame in shown))
    rows.append(f"{'skill (L1)':>14}" + "".join(f"{ahead[frame]:9.1%}" for frame in shown))
    if "spread" in result:
        rows.append(
            f"{'samples':>14}  L1 of one {result['sample_l1']:.4f}, of the best {result['best_l1']:.4f}; "
            f"spread / error {result['spread']:.2f} (1 is calibrated)"
        )
    return "\n".join(rows)
