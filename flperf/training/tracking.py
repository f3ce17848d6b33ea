"""Where a run leaves its traces: the run's folder, `metrics.jsonl`, dashboards, a progress bar. Only the main process writes.

A folder is never silently reused: a run resumes the earlier one of the same name if its configuration is the same in all that
shapes the result, and stops with the differences otherwise.
"""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from flperf.config import Config, differences, dump_config
from flperf.data import Dataset
from flperf.engine.process import Process
from flperf.errors import UserError
from flperf.files import write_durably, writing
from flperf.training.dashboards import Dashboard, Rows, open_dashboards

PACKAGES = ("torch", "deepspeed", "xformers", "transformers", "nvidia-dali-cuda130", "triton", "av", "numpy")
# Keys that may change when a run is resumed: none of them alters what is learnt.
FREE_SECTIONS = {"engine", "evaluation", "checkpoint", "tracking"}
FREE_KEYS = {
    "dataset.decoder",
    "dataset.threads",
    "dataset.prefetch",
    "dataset.validation",
    "trainer.micro_batch_size",
    "trainer.stop_after",
    "trainer.max_skipped_updates",
    "model.activation_checkpointing",
    "model.fused_adaln",
}
START_ANEW = "set name=... for a new run, or --overwrite to put the old one aside and start anew"
PROGRESS_SECONDS = 10  # at least, between two lines of progress where there is no terminal


class RunFolder:
    """`experiment/<name>`; debugging runs share `experiment/debug/<name>`, which each of them replaces."""

    def __init__(self, config: Config, debug: bool):
        self.debug = debug
        self.path = Path(config.experiment, "debug", config.name) if debug else Path(config.experiment, config.name)
        self.checkpoints = self.path / "checkpoints"
        self.statistics = self.path / "latent_statistics.safetensors"
        self.metrics = self.path / "metrics.jsonl"

    def check(self, config: Config) -> None:
        """Raise `UserError` if an earlier run of this name had another configuration."""
        path = self.path / "config.yaml"
        if self.debug or not path.exists():
            return
        try:
            earlier = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError):
            earlier = None
        now = yaml.safe_load(dump_config(config))
        if not isinstance(earlier, dict) or now.keys() - earlier.keys():  # what is cut off after a section is YAML still
            raise UserError(f"{path}: is damaged; remove it to go on with the run as it is configured now, or start anew with --overwrite")
        changed = [line for line in differences(earlier, now) if not _is_free(line.split(":")[0])]
        if changed:
            raise UserError(f"{path}: is that of a run with another configuration ({'; '.join(changed)}); {START_ANEW}")

    def open(self, config: Config, process: Process, dataset: Dataset, *, overwrite: bool) -> None:
        """Make the folder and describe the run in it; with `overwrite`, put an earlier run aside under another name. Raises `UserError` if
        an earlier run of this name had other training clips."""
        clips = training_clips(dataset)
        if not (self.debug or overwrite):
            self._check_clips(clips)
        if process.is_main:
            with writing(self.path):
                if self.debug:
                    shutil.rmtree(self.path, ignore_errors=True)
                elif overwrite and self.path.exists():
                    count = 1 + len(list(self.path.parent.glob(f"{self.path.name}.replaced-*")))
                    self.path.rename(self.path.with_name(f"{self.path.name}.replaced-{count}"))
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_durably(self.path / "config.yaml", dump_config(config))
            self.describe(**describe_run(process), training=clips)
        dist.barrier()

    def _check_clips(self, clips: dict) -> None:
        earlier = self._described().get("training", clips)
        if earlier["order"] != clips["order"]:
            raise UserError(
                f"dataset.train: names other clips ({clips['clips']}), or in another order, than the run in {self.path} was trained on "
                f"({earlier['clips']}); {START_ANEW}"
            )

    def describe(self, **facts) -> None:
        """Write facts about this launch into `run.json`, beside or in place of those that stand there."""
        write_durably(self.path / "run.json", json.dumps(self._described() | facts, indent=2) + "\n")

    def run_id(self) -> str:
        """What dashboards know the run by: drawn at its first start and kept, so that every later start goes on with the same one."""
        if "run_id" not in self._described():
            self.describe(run_id=uuid.uuid4().hex[:8])
        return self._described()["run_id"]

    def _described(self) -> dict:
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):  # not there yet, or damaged: the run goes on without what it said
            return {}


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS


def training_clips(dataset: Dataset) -> dict:
    """How many training clips there are, and a digest of their order, on which every sample of a run depends."""
    paths = dataset.splits["train"].paths
    return {"clips": len(paths), "order": hashlib.sha256("\n".join(paths).encode()).hexdigest()}


def describe_run(process: Process) -> dict:
    """Versions, commit, devices and command: what is needed to say later what ran."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    name = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else f"{platform.processor() or platform.machine()}"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": commit or None,
        "versions": {"python": platform.python_version(), "flperf": version("flperf")} | {name: version(name) for name in PACKAGES},
        "device": name,
        "threads": torch.get_num_threads(),
        "world_size": process.world_size,
    }


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
        self.bar = tqdm(total=total_steps, initial=first_step, desc=config.name, unit="step", dynamic_ncols=True, disable=None)
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
    """Numbers under `train/` or `val/`; those of each latent frame ahead, lists in metrics.jsonl, under `val/horizon_01/` and so on."""
    split = metrics.get("split", "train")
    values = {f"{split}/{key}": value for key, value in metrics.items() if isinstance(value, int | float)}
    for key, ahead in metrics.get("horizon", {}).items():
        values |= {f"{split}/horizon_{frame:02d}/{key}": value for frame, value in enumerate(ahead, start=1)}
    return values


def progress_text(metrics: dict) -> str:
    """Loss, clips a second, and the stage that takes most of the step."""
    stages = {key.removesuffix("_ms"): metrics[key] for key in ("data_ms", "encode_ms", "head_ms", "optim_ms") if key in metrics}
    slowest = max(stages, key=stages.get)
    share = stages[slowest] / max(metrics["step_ms"], 1e-9)
    return f"loss {metrics['loss']:.4f}, {metrics['clips_per_s']:.1f} clips/s, {slowest} {share:.0%}"
