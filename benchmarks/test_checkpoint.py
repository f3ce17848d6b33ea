"""Measures how long training waits for a checkpoint that is written in the background, compared with waiting for the
write and with DeepSpeed's checkpoint; and how long loading takes.

    python -m pytest benchmarks/test_checkpoint.py

All save the same state. Ours is written when it is on disk (fsync), DeepSpeed's when it is in the page cache.
"""

from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks.sizes import QUICK
from flperf.config import load_config
from flperf.engine.checkpoint import Checkpoints
from flperf.engine.engine import build_engine
from flperf.engine.optimizer import set_schedule
from flperf.engine.process import batch_share, start_process
from flperf.models.heads import build_head
from flperf.models.latents import latent_geometry

DEMO = Path(__file__).parents[1] / "configs/demo.yaml"
SIZE = [
    "model.hidden_dim=512",
    f"model.depth={1 if QUICK else 6}",
    "model.num_heads=8",
    "model.head=predictor",
    "objective.kind=regression",
]


@pytest.fixture(scope="module")
def engine():
    """A predictor of about 20 M parameters after one update, at ZeRO 1 in fp32: 16 bytes of state per parameter."""
    process = start_process()
    config = load_config(DEMO, [*SIZE, "engine.zero_stage=1"])
    geometry = latent_geometry(config, 8, 4, 4, 64)
    head = build_head(config.model, geometry, seed=0, compile=False)
    engine = build_engine(head, config, batch_share(config.trainer, process), torch.float32, process.device)
    set_schedule(engine, 0, config.trainer, 10)
    context = torch.randn(1, geometry.context_frames, 4, 4, 64, device=process.device)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(context).square().mean())
        engine.step()
    return engine


@pytest.fixture
def checkpoints(engine, tmp_path):
    checkpoints = Checkpoints(engine, tmp_path / "ours", keep=1)
    yield checkpoints
    checkpoints.close()


def state_bytes(engine) -> int:
    return 16 * sum(parameter.numel() for parameter in engine.module.parameters())


@pytest.mark.benchmark(group="hold-up of training by a checkpoint")
def test_save(record, engine, checkpoints, tmp_path):
    steps = count(1)

    def save() -> None:
        checkpoints.save(next(steps))

    def save_and_wait() -> None:
        save()
        checkpoints.wait()

    beside = {
        "waiting for the write": save_and_wait,
        "DeepSpeed": lambda: engine.save_checkpoint(str(tmp_path / "deepspeed"), tag="last"),
    }
    # The write of the previous round does not count.
    record(
        save,
        "GB",
        state_bytes(engine) / 1e9,
        bytes=2 * state_bytes(engine),
        beside=beside,
        before=lambda _: checkpoints.wait(),
    )


@pytest.mark.benchmark(group="loading a checkpoint")
def test_load(record, engine, checkpoints, tmp_path):
    """Ours verifies the checksums, too."""
    checkpoints.save(1)
    checkpoints.wait()
    engine.save_checkpoint(str(tmp_path / "deepspeed"), tag="last")
    beside = {"DeepSpeed": lambda: engine.load_checkpoint(str(tmp_path / "deepspeed"), tag="last")}
    record(checkpoints.resume, "GB", state_bytes(engine) / 1e9, bytes=2 * state_bytes(engine), beside=beside)
