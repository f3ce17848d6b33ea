"""A small configuration on drawn clips, and the real launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

TINY = """
experiment: {folder}/experiment
backbone:
  kind: vjepa2
  architecture: {{crop_size: 32, hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 2, pred_num_hidden_layers: 1}}
dataset:
  kind: bouncing_shapes
  n_frames: 8
  shapes: {{train_clips: 10, validation_clips: 5}}
latents: {{statistics_clips: 8}}
model: {{head: predictor, num_context_latents: 2, hidden_dim: 32, depth: 2, num_heads: 2}}
trainer: {{batch_size: 4, max_steps: 4, learning_rate: 1.0e-3, warmup_steps: 1}}
engine: {{compile: false, precision: fp32}}
evaluation: {{eval_every: 1000, sampling: {{steps: 2, samples: 2}}, dump_examples: 0}}
checkpoint: {{save_every: 1000}}
tracking: {{wandb: none, log_every: 1}}
"""  # noqa: E501

REGIMES = {
    "predictor": ["model.head=predictor", "objective.kind=regression", "objective.loss=l1"],
    "cross_attention": ["model.head=cross_attention", "objective.kind=regression", "objective.loss=smooth_l1"],
    "flow_matching": ["model.head=dit", "objective.kind=flow_matching", "objective.tau_distribution=logit_normal"],
}
VIT = ["crop_size=null", "pred_num_hidden_layers=null", "image_size=32", "intermediate_size=48"]
BACKBONES = {
    "vjepa2": [],
    "dinov3": [
        *("backbone.kind=dinov3", "backbone.frame_stride=2"),
        *(f"backbone.architecture.{size}" for size in (*VIT, "num_register_tokens=4")),
    ],
}
FOUR_DS = ["backbone.kind=4ds", *(f"backbone.architecture.{size}" for size in VIT)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def launch(
    processes: int, *command: str, timeout: float = 600, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """`deepspeed --num_accelerators N command…` on this machine; returns it finished, with its output as text."""
    launcher = Path(sys.executable).with_name("deepspeed")
    arguments = [str(launcher), "--num_accelerators", str(processes), "--master_port", str(free_port()), *command]
    # The launcher starts `python3` of the PATH.
    path = f"{launcher.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        arguments,
        env={**os.environ, "PATH": path, **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
