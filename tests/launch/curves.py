"""Started by the tests under the deepspeed launcher: trains each of several configurations for a few steps and writes
what was seen.

Usage: deepspeed … curves.py REQUESTS.json RESULTS.json. A request is a name and a list of overrides on the base
configuration; a result holds its losses and gradient norms step by step, and the clips (row and sample) that the
processes saw in each step.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist

from flperf.config import load_config
from flperf.engine.process import start_process
from flperf.run import build_run
from flperf.training import loop
from flperf.training.run_folder import RunFolder


def curve(config_path: str, name: str, overrides: list[str], process) -> dict:
    config = load_config(config_path, [f"name={name}", *overrides])
    run = build_run(config, process)
    seen = []
    training_latents = run.training_latents

    def spy(batch):
        seen.append([[int(s), int(c)] for s, c in zip(batch.sample, batch.clip, strict=True)])
        return training_latents(batch)

    run.training_latents = spy
    folder = RunFolder(config, debug=False)
    folder.open(config, process, run.dataset, overwrite=False)
    loop.train(run, folder)
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


def main() -> None:
    requests, results = (path for path in sys.argv[-2:])
    config_path, named = json.loads(Path(requests).read_text())
    process = start_process()
    curves = {name: curve(config_path, name, overrides, process) for name, overrides in named.items()}
    if process.is_main:
        Path(results).write_text(json.dumps(curves))


if __name__ == "__main__":
    main()
