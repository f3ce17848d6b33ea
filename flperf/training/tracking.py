"""Where a run leaves its traces: the run's folder, `metrics.jsonl`, dashboards, a progress bar. Only the main process
writes.

A folder is never silently reused: a run resumes the earlier one of the same name if its configuration is the same in
all that shapes the result, and stops with the differences otherwise.
"""

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

PROGRESS_SECONDS = 10  # at least, between two lines of progress where there is no terminal


class Tracker:
    """Writes metrics on the main process; on the others every method does nothing."""

    def __init__(self, config: Config, folder: RunFolder, is_main: bool, first_step: int, total_steps: int):
        self.active = is_main
        self.folder = folder
        if not is_main:
            return
        self.dashboards: list[Dashboard] = open_dashboards(config, folder.path, folder.run_id(), first_step)
        with writing(folder.metrics):
            cut_torn_line(folder.metrics)
            self.file = folder.metrics.open("a")
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=config.name, unit="step", dynamic_ncols=True, disable=None
        )
        self.said = -math.inf

    def step(self) -> None:
        if self.active:
            self.bar.update()

    def log(self, metrics: dict) -> None:
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
        """Progress beside the bar; where there is no terminal, hence no bar, in a line of its own now and then."""
        self.bar.set_postfix_str(progress_text(metrics))
        if self.bar.disable and time.monotonic() - self.said >= PROGRESS_SECONDS:
            text = f"{progress_text(metrics)}, waited {metrics['data_ms']:.0f} of {metrics['step_ms']:.0f} ms for data"
            print(f"step {metrics['step']} of {self.bar.total}: {text}", flush=True)
            self.said = time.monotonic()

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text)

    def table(self, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
        """A table to the dashboards."""
        if self.active:
            for dashboard in self.dashboards:
                dashboard.table(name, columns, rows, step)

    def picture(self, name: str, path: Path, step: int) -> None:
        """A PNG of the run's folder to the dashboards."""
        if self.active:
            for dashboard in self.dashboards:
                dashboard.picture(name, path, step)

    def describe(self, **facts) -> None:
        """Into `run.json`."""
        if self.active:
            self.folder.describe(**facts)

    def close(self) -> None:
        if not self.active:
            return
        self.bar.close()
        for dashboard in self.dashboards:
            hint = dashboard.close()
            if hint:
                print(f"to look at it: {hint}")
        with writing(self.folder.metrics):
            self.file.close()


def cut_torn_line(path: Path) -> None:
    """Drop the half line that a full disk or a kill has left at the end, lest the next one be written behind it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def json_line(metrics: dict) -> str:
    """One line of `metrics.jsonl`."""
    return json.dumps(without_nan(metrics), allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """NaN and infinity as None: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(metrics: dict) -> dict[str, float]:
    """Numbers under `train/` or `val/`; those of each latent frame ahead, lists in metrics.jsonl, under
    `val/horizon_01/` and so on."""
    split = metrics.get("split", "train")
    values = {f"{split}/{key}": value for key, value in metrics.items() if isinstance(value, int | float)}
    for key, ahead in metrics.get("horizon", {}).items():
        values |= {f"{split}/horizon_{frame:02d}/{key}": value for frame, value in enumerate(ahead, start=1)}
    return values


def progress_text(metrics: dict) -> str:
    """Loss, clips a second, and the stage that takes most of the step."""
    stages = {
        key.removesuffix("_ms"): metrics[key]
        for key in ("data_ms", "encode_ms", "head_ms", "optim_ms")
        if key in metrics
    }
    slowest = max(stages, key=stages.get)
    share = stages[slowest] / max(metrics["step_ms"], 1e-9)
    return f"loss {metrics['loss']:.4f}, {metrics['clips_per_s']:.1f} clips/s, {slowest} {share:.0%}"
