"""A process of benchmarks/parity.py: trains one request after another and writes their curves."""

import json
import sys
from pathlib import Path

from benchmarks import sizes
from flperf.config import Config
from flperf.engine.process import Process, batch_share, start_process
from flperf.run import build_components, build_training_engine
from flperf.training import loop
from flperf.training.run_folder import RunFolder

CLIPS, BATCH = 64, 4


def configuration(head: str, keys: list[str], steps: int, folder: Path, name: str) -> Config:
    """A small run on drawn clips that logs each step and evaluates nothing."""
    run = [f"name={name}", f"experiment={folder}", f"trainer.batch_size={BATCH}", f"trainer.max_steps={steps}"]
    run += ["trainer.warmup_steps=3", "trainer.learning_rate=3e-3", "tracking.log_every=1", "tracking.wandb=none"]
    run += [f"dataset.shapes.train_clips={CLIPS}", "dataset.shapes.validation_clips=0", "latents.statistics_clips=16"]
    run += [f"checkpoint.save_every={10**6}", f"evaluation.eval_every={10**6}", "dataset.labels=null"]
    return sizes.configuration(head, "vjepa2", *run, *keys, size=sizes.SMALL if sizes.ON_GPU else sizes.TOY)


def curves(config: Config, process: Process) -> dict[str, list[float]]:
    """Loss and norm of the gradient of each step, over all processes, as a run logs them."""
    components = build_components(config, process, batch_share(config.trainer, process))
    folder = RunFolder(config, debug=False)
    folder.open(config, process, components.dataset, overwrite=False)
    loop.train(components, build_training_engine(components), folder)
    lines = map(json.loads, folder.metrics.read_text().splitlines())
    steps = [line for line in lines if "split" not in line]
    return {name: [line[name] for line in steps] for name in ("loss", "grad_norm")}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    process = start_process()
    answers = []
    for number, request in enumerate(job["requests"]):
        name = f"run_{process.world_size}_{number}"
        config = configuration(request["head"], request["keys"], job["steps"], Path(job["folder"]), name)
        answers.append(curves(config, process))
    if process.is_main:
        Path(job["answer"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1])
