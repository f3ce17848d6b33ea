"""How long a checkpoint holds training up: copied and written beside it, waited for, or written by DeepSpeed.

    python -m pytest benchmarks/test_checkpoint.py

All three save the same state. DeepSpeed's own files are left in the page cache; ours are on disk (fsync) when they count as written.
"""

from pathlib import Path

import pytest
import torch

from benchmarks.sizes import QUICK
from flperf.checkpoint import Checkpoints
from flperf.config import load_config
from flperf.engine import build_engine, place_among, set_schedule, start_process
from flperf.heads import build_head
from flperf.latents import latent_layout

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
    """A predictor of about 20 M parameters after one update, at ZeRO 1 in fp32: 16 bytes of state a parameter."""
    process = start_process()
    config = load_config(DEMO, [*SIZE, "engine.zero_stage=1"])
    layout = latent_layout(config, 8, 4, 4, 64)
    head = build_head(config.model, layout, seed=0, compile=False)
    engine = build_engine(head, config, place_among(config.trainer, process), torch.float32, process.device)
    set_schedule(engine, 0, config.trainer, 10)
    context = torch.randn(1, layout.context_frames, 4, 4, 64)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(context).square().mean())
        engine.step()
    return engine


@pytest.mark.benchmark(group="hold-up of training by a checkpoint")
@pytest.mark.parametrize("way", ["copied, written beside", "waited for", "DeepSpeed"])
def test_save(benchmark, engine, tmp_path, way):
    checkpoints, steps = Checkpoints(engine, tmp_path, keep=1), iter(range(1, 1000))

    def save(step: int) -> None:
        if way == "DeepSpeed":
            engine.save_checkpoint(str(tmp_path), tag=f"deepspeed_{step}")
            return
        checkpoints.save(step)
        if way == "waited for":
            checkpoints.wait()

    def before():
        checkpoints.wait()  # the write of the round before is not the copy's
        return (next(steps),), {}

    benchmark.pedantic(save, setup=before, rounds=5, warmup_rounds=1)
    checkpoints.close()
    benchmark.extra_info["state_bytes"] = 16 * sum(parameter.numel() for parameter in engine.module.parameters())
