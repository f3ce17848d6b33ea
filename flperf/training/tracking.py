"""Writes a run's metrics to `metrics.jsonl` and to dashboards, and shows its progress."""

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flperf.config import Config
from flperf.files import writing
from flperf.training.dashboards import Dashboard, Rows, open_dashboards
from flperf.training.run_folder import RunFolder

PROGRESS_SECONDS = 10  # shortest time between two lines of progress without a terminal


class Tracker:
    """Writes on the main process; on the others every method does nothing."""

    def __init__(self, config: Config, folder: RunFolder, is_main: bool, first_step: int, total_steps: int):
        self.active = is_main
        self.folder = folder
        if not is_main:
            return
        self.dashboards: list[Dashboard] = open_dashboards(config, folder.path, folder.run_id(), first_step)
        with writing(folder.metrics):
            drop_incomplete_line(folder.metrics)
            self.file = folder.metrics.open("a")
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=config.name, unit="step", dynamic_ncols=True, disable=None
        )
        self.last_shown = -math.inf

    def step(self) -> None:
        """Advance the progress bar by a step."""
        if self.active:
            self.bar.update()

    def log(self, metrics: dict) -> None:
        """Add a line to `metrics.jsonl`, and its numbers to the dashboards. Metrics of training have no "split"."""
        if not self.active:
            return
        with writing(self.folder.metrics):
            self.file.write(json_line(metrics))
            self.file.flush()
        for dashboard in self.dashboards:
            dashboard.numbers(scalars(metrics), metrics["step"])
        if "split" not in metrics:
            self._show(metrics)

    def _show(self, metrics: dict) -> None:
        """Show progress beside the bar. Without a terminal there is no bar, but a line from time to time."""
        self.bar.set_postfix_str(progress_text(metrics))
        if self.bar.disable and time.monotonic() - self.last_shown >= PROGRESS_SECONDS:
            text = f"{progress_text(metrics)}, waited {metrics['data_ms']:.0f} of {metrics['step_ms']:.0f} ms for data"
            print(f"step {metrics['step']} of {self.bar.total}: {text}", flush=True)
            self.last_shown = time.monotonic()

    def message(self, text: str) -> None:
        """Print lines without disturbing the progress bar."""
        if self.active:
            tqdm.write(text)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """Show a table on the dashboards."""
        if self.active:
            for dashboard in self.dashboards:
                dashboard.table(name, columns, rows, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file on the dashboards."""
        if self.active:
            for dashboard in self.dashboards:
                dashboard.picture(name, path, step)

    def describe(self, **facts) -> None:
        """Write facts into `run.json`."""
        if self.active:
            self.folder.describe(**facts)

    def close(self) -> None:
        """Write what is pending, and print how to view the dashboards."""
        if not self.active:
            return
        self.bar.close()
        for dashboard in self.dashboards:
            hint = dashboard.close()
            if hint:
                print(f"to view it: {hint}")
        with writing(self.folder.metrics):
            self.file.close()


def drop_incomplete_line(path: Path) -> None:
    """Remove the incomplete last line that a full disk or a kill may have left, so that the next line is valid."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def json_line(metrics: dict) -> str:
    """One line of `metrics.jsonl`."""
    return json.dumps(without_nan(metrics), allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(metrics: dict) -> dict[str, float]:
    """Numbers by name for dashboards, under `train/` or `val/`. The lists over latent frames become `val/horizon_01/…`,
    `val/horizon_02/…` and so on."""
    split = metrics.get("split", "train")
    values = {f"{split}/{key}": value for key, value in metrics.items() if isinstance(value, int | float)}
    for key, frames in metrics.get("horizon", {}).items():
        values |= {f"{split}/horizon_{frame:02d}/{key}": value for frame, value in enumerate(frames, start=1)}
    return values


def progress_text(metrics: dict) -> str:
    """Loss, clips per second, and the slowest stage with its share of the step."""
    stages = {
        key.removesuffix("_ms"): metrics[key]
        for key in ("data_ms", "encode_ms", "head_ms", "optim_ms")
        if key in metrics
    }
    slowest = max(stages, key=stages.__getitem__)
    share = stages[slowest] / max(metrics["step_ms"], 1e-9)
    return f"loss {metrics['loss']:.4f}, {metrics['clips_per_s']:.1f} clips/s, {slowest} {share:.0%}"
