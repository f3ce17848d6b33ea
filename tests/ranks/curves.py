"""Several short training runs in one group of processes, and what was logged and seen in each."""

import json
from unittest import mock

import torch.distributed as dist

from flperf.config import load_config
from flperf.engine.process import batch_share, start_process
from flperf.run import TrainingRun, build_components, build_training_engine
from flperf.training import loop
from flperf.training.run_folder import RunFolder


def curve(config_path: str, name: str, overrides: list[str], process) -> dict:
    """Losses and gradient norms by step, evaluations, and the (sample, clip) pairs that all ranks saw in each step."""
    config = load_config(config_path, [f"name={name}", *overrides])
    components = build_components(config, process, batch_share(config.trainer, process))
    seen = []
    training_latents = TrainingRun.training_latents

    def spy(run, batch):
        seen.append([[int(s), int(c)] for s, c in zip(batch.sample, batch.clip, strict=True)])
        return training_latents(run, batch)

    folder = RunFolder(config, debug=False)
    folder.open(config, process, components.dataset, overwrite=False)
    with mock.patch.object(TrainingRun, "training_latents", spy):
        loop.train(components, build_training_engine(components), folder)
    everyone: list = [None] * process.world_size
    dist.all_gather_object(everyone, seen)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    steps = [line for line in lines if "split" not in line]
    return {
        "loss": [line["loss"] for line in steps],
        "grad_norm": [line["grad_norm"] for line in steps],
        "step": [line["step"] for line in steps],
        "skipped_updates": steps[-1]["skipped_updates"] if steps else 0,
        "validation": [line for line in lines if line.get("split") == "val"],
        "seen": [sorted(pair for rank in step for pair in rank) for step in zip(*everyone, strict=True)],
    }


def curves(config_path: str, requests: dict[str, list[str]]) -> dict[str, dict]:
    """The runs, one after another, by name; a request is its overrides on the configuration file."""
    process = start_process()
    return {name: curve(config_path, name, overrides, process) for name, overrides in requests.items()}
