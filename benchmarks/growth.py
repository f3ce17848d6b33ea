"""Measures how the time of a training step grows with clips, frames, tokens, depth and processes: a table, a picture
and fitted exponents.

    python -m benchmarks.growth --picture growth.png

One size grows at a time. The exponent is the slope of log(time) over log(size), fitted to the larger half of the
points, where constant costs count little. Times are CPU seconds of one thread (seconds on a GPU), the least of a few.
With more processes each takes the same number of clips, so that the time should be constant; it is the wall time of a
whole update, with one thread for each process on this CPU's cores.
"""

import argparse
import os
import time
import timeit
from pathlib import Path

import numpy as np
import torch

from benchmarks import sizes
from benchmarks.scaling import UPDATES, workers
from flperf.models.encoder import encode_clip

START = {"clips": 2, "frames": 8, "tokens a frame": 16, "depth": 4}
SWEEPS = {
    "clips": (1, 2, 4, 8, 16),
    "frames": (4, 8, 16, 32, 64),
    "tokens a frame": (4, 16, 64, 144, 256),
    "depth": (2, 4, 8, 16),
}
PROCESSES = (1, 2)
# By the number of operations. Attention is quadratic in tokens, so frames and tokens are between 1 and 2.
EXPECTED = {"clips": "1", "frames": "1 to 2", "tokens a frame": "1 to 2", "depth": "1", "processes": "0"}
ROUNDS = 5


def step(clips: int, frames: int, tokens: int, depth: int):
    """A function that encodes clips and runs the head forward and backward on their latents; eager, so that no size is
    compiled."""
    crop_size = 16 * round(tokens**0.5)
    architecture = {"crop_size": crop_size, "hidden_size": 192, "num_hidden_layers": depth, "num_attention_heads": 3}
    model = ["model.hidden_dim=192", f"model.depth={depth}", "model.num_heads=3"]
    model.append(f"model.num_context_latents={frames // 4}")
    config = sizes.configuration("predictor", size={"frames": frames, "vjepa2": architecture, "model": model})
    encoder = sizes.encoder_of(config, sizes.DTYPE, False)
    geometry = sizes.geometry_of(config, encoder)
    head = sizes.head_of(config, geometry, sizes.DTYPE, False)
    video = sizes.video_of(config)[:1].repeat(clips, 1, 1, 1, 1)

    def run() -> None:
        context, target = encode_clip(encoder, video, geometry, "split")
        (head(context) - target).float().square().mean().backward()

    return run


def seconds(function) -> float:
    """The least time of a few calls."""
    if sizes.ON_GPU:
        torch.cuda.synchronize()
    clock, best = time.perf_counter if sizes.ON_GPU else time.process_time, float("inf")
    for _ in range(ROUNDS + 1):
        start = clock()
        function()
        if sizes.ON_GPU:
            torch.cuda.synchronize()
        best = min(best, clock() - start)
    return best


def exponent(values: list[int], times: list[float]) -> float:
    """The fitted exponent of time over size."""
    half = min(len(values) // 2, len(values) - 2)
    return float(np.polyfit(np.log(values[half:]), np.log(times[half:]), 1)[0])


def update_seconds(processes: int) -> float:
    """The least time of a few updates by this number of processes together."""
    with workers(processes) as group:
        return min(timeit.repeat(group.update, number=1, repeat=ROUNDS)) / UPDATES


def measure() -> dict[str, tuple[list[int], list[float]]]:
    """Sizes and times by the name of the size; prints a line for each."""
    curves = {}
    for name, values in SWEEPS.items():
        curves[name] = (list(values), [seconds(step(*(START | {name: value}).values())) for value in values])
    if not sizes.ON_GPU and len(os.sched_getaffinity(0)) >= max(PROCESSES):
        curves["processes"] = (list(PROCESSES), [update_seconds(count) for count in PROCESSES])
    for name, (values, times) in curves.items():
        shown = ", ".join(f"{value}: {1e3 * t:.0f} ms" for value, t in zip(values, times, strict=True))
        print(f"{name:15} ^{exponent(values, times):.2f} (expected {EXPECTED[name]})   {shown}", flush=True)
    return curves


def draw(curves: dict[str, tuple[list[int], list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), sharey=True, constrained_layout=True)
    for axis, (name, (values, times)) in zip(axes, curves.items(), strict=True):
        axis.loglog(values, [1e3 * t for t in times], "o-", base=2)
        axis.set(title=f"{name}: exponent {exponent(values, times):.2f}", xlabel=name)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a training step")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("growth.png"), metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw(measure(), options.picture)
    print(f"drawn to {options.picture}")


if __name__ == "__main__":
    main()
