"""Where a run leaves its traces: the run's folder, `metrics.jsonl`, dashboards, a progress bar. Only the main process writes.

A folder is never silently reused: a run resumes the earlier one of the same name if its configuration is the same in all that
shapes the result, and stops with the differences otherwise.
"""

import json
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from flperf.config import Config, UserError, differences, dump_config
from flperf.dashboards import Dashboard, Rows, open_dashboards
from flperf.engine import Process

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
        if self.debug or not (self.path / "config.yaml").exists():
            return
        earlier = yaml.safe_load((self.path / "config.yaml").read_text())
        changed = [line for line in differences(earlier, yaml.safe_load(dump_config(config))) if not _is_free(line.split(":")[0])]
        if changed:
            raise UserError(
                f"{self.path} holds a run with another configuration ({'; '.join(changed)}); "
                "set name=... for a new run, or --overwrite to put the old one aside and start anew"
            )

    def open(self, config: Config, process: Process, *, overwrite: bool) -> None:
        """Make the folder and describe the run in it; with `overwrite`, put an earlier run aside under another name."""
        if process.is_main:
            if self.debug:
                shutil.rmtree(self.path, ignore_errors=True)
            elif overwrite and self.path.exists():
                count = 1 + len(list(self.path.parent.glob(f"{self.path.name}.replaced-*")))
                self.path.rename(self.path.with_name(f"{self.path.name}.replaced-{count}"))
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(dump_config(config))
            self.describe(**describe_run(process))
        dist.barrier()

    def describe(self, **facts) -> None:
        """Write facts about this launch into `run.json`, beside or in place of those that stand there."""
        (self.path / "run.json").write_text(json.dumps(self._described() | facts, indent=2) + "\n")

    def run_id(self) -> str:
        """What dashboards know the run by: drawn at its first start and kept, so that every later start goes on with the same one."""
        if "run_id" not in self._described():
            self.describe(run_id=uuid.uuid4().hex[:8])
        return self._described()["run_id"]

    def _described(self) -> dict:
        path = self.path / "run.json"
        return json.loads(path.read_text()) if path.exists() else {}


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS


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
        self.file = folder.metrics.open("a")
        self.bar = tqdm(total=total_steps, initial=first_step, desc=config.name, unit="step", dynamic_ncols=True, disable=None)

    def step(self) -> None:
        if self.active:
            self.bar.update()

    def log(self, metrics: dict) -> None:
        if not self.active:
            return
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        for dashboard in self.dashboards:
            dashboard.numbers(scalars(metrics), metrics["step"])
        if "split" not in metrics:
            self.bar.set_postfix_str(progress_text(metrics))

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
        self.file.close()
        for dashboard in self.dashboards:
            hint = dashboard.close()
            if hint:
                print(f"to look at it: {hint}")


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
