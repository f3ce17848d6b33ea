"""The folder of a run.

A run resumes the earlier one of the same name if both have the same training clips and the same configuration in all
that shapes the result. Otherwise it stops with an error that lists the differences.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import yaml

from flperf.config import Config, differences, dump_config
from flperf.data import Dataset
from flperf.engine.process import Process
from flperf.errors import UserError
from flperf.files import write_atomically, writing

PACKAGES = ("torch", "deepspeed", "xformers", "transformers", "nvidia-dali-cuda130", "triton", "av", "numpy")

# Keys that may change when a run is resumed, because they do not alter what is learnt.
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
    "model.fused_kernels",
    "model.fused_adaln",  # of earlier runs
}

START_OVER = "set name=... for a new run, or --overwrite to rename the old one and start over"


class RunFolder:
    """`experiment/<name>`, or `experiment/debug/<name>`, which every debugging run replaces."""

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
        current = yaml.safe_load(dump_config(config))
        # A file that was cut off after a section is still valid YAML.
        if not isinstance(earlier, dict) or current.keys() - earlier.keys():
            raise UserError(
                f"{path}: is damaged; remove it to resume with the current configuration, or start over with "
                "--overwrite"
            )
        # A key that is newer than that run had no effect on it, as its default has none.
        earlier = _completed(earlier, yaml.safe_load(dump_config(Config())))
        changed = [line for line in differences(earlier, current) if not _is_free(line.split(":")[0])]
        if changed:
            raise UserError(f"{path}: that run has another configuration ({'; '.join(changed)}); {START_OVER}")

    def open(self, config: Config, process: Process, dataset: Dataset, *, overwrite: bool) -> None:
        """Make the folder and write `config.yaml` and `run.json`. With `overwrite`, an earlier run of this name is
        renamed. Raises `UserError` if an earlier run of this name had other training clips. A collective."""
        clips = training_clips(dataset)
        if not (self.debug or overwrite):
            self._check_clips(clips, "dataset.sources" if dataset.splits["train"].sources else "dataset.train")
        if process.is_main:
            with writing(self.path):
                if self.debug:
                    shutil.rmtree(self.path, ignore_errors=True)
                elif overwrite and self.path.exists():
                    count = 1 + len(list(self.path.parent.glob(f"{self.path.name}.replaced-*")))
                    self.path.rename(self.path.with_name(f"{self.path.name}.replaced-{count}"))
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / "config.yaml", dump_config(config))
            self.describe(**describe_run(process), training=clips)
        dist.barrier()

    def _check_clips(self, clips: dict, key: str) -> None:
        earlier = self._described().get("training", clips)
        if earlier["order"] != clips["order"]:
            raise UserError(
                f"{key}: names other clips ({clips['clips']}), or in another order, than the run in "
                f"{self.path} was trained on ({earlier['clips']}); {START_OVER}"
            )

    def describe(self, **facts) -> None:
        """Add facts about this start to `run.json`; they replace older values of the same name."""
        write_atomically(self.path / "run.json", json.dumps(self._described() | facts, indent=2) + "\n")

    def run_id(self) -> str:
        """The identifier of this run on dashboards, which all starts of the run have in common."""
        if "run_id" not in self._described():
            self.describe(run_id=uuid.uuid4().hex[:8])
        return self._described()["run_id"]

    def _described(self) -> dict:
        try:
            return json.loads((self.path / "run.json").read_text())
        except (OSError, ValueError):  # does not exist yet, or is damaged; the run does not depend on it
            return {}


def _completed(values: dict, defaults: dict) -> dict:
    """The values, and the defaults of the keys that have none, in all sections."""
    sections = [key for key, value in values.items() if isinstance(value, dict) and isinstance(defaults.get(key), dict)]
    return defaults | values | {key: _completed(values[key], defaults[key]) for key in sections}


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.split(".")[0] in FREE_SECTIONS


def training_clips(dataset: Dataset) -> dict:
    """The number of training clips and a digest of their order, on which every sample of a run depends."""
    train = dataset.splits["train"]
    lines = [os.fsencode(path) for path in train.paths] + [b"%d" % source.size for source in train.sources]
    return {"clips": len(train), "order": hashlib.sha256(b"\n".join(lines)).hexdigest()}


def _commit() -> str | None:
    """The commit of flperf, if it runs from a repository and there is git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None


def describe_run(process: Process) -> dict:
    """Versions, commit, device and command, to document the run."""
    name = (
        torch.cuda.get_device_name(process.device)
        if process.device.type == "cuda"
        else f"{platform.processor() or platform.machine()}"
    )
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "flperf": version("flperf")}
        | {name: version(name) for name in PACKAGES},
        "device": name,
        "threads": torch.get_num_threads(),
        "world_size": process.world_size,
    }
