"""Compares the compile time of one repeated block with that of the whole model, at the reference depth and small
widths.

    python -m benchmarks.startup                # 24 encoder and 12 head layers of width 64

Each way compiles the encoder's forward pass and the head's forward and backward pass, in its own process with an empty
cache. Seconds are CPU time of the process and its compiler workers, which other work on the machine changes little.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks import sizes
from flperf.models.encoder import Encoder

ARCHITECTURE = {"crop_size": 64, "hidden_size": 64, "num_attention_heads": 2}
WAYS = ("per block", "whole model")


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def compile_once(way: str, encoder_layers: int, head_layers: int) -> None:
    """Print CPU seconds and wall seconds of the first calls."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # compile in this process, whose time is measured
    model = ["model.hidden_dim=64", f"model.depth={head_layers}", "model.num_heads=2", "model.num_context_latents=2"]
    size = {"frames": 8, "vjepa2": ARCHITECTURE | {"num_hidden_layers": encoder_layers}, "model": model}
    config = sizes.configuration("predictor", size=size)
    encoder: Encoder = sizes.encoder_of(config, torch.float32, way == "per block")
    geometry = sizes.geometry_of(config, encoder)
    head = sizes.head_of(config, geometry, torch.float32, way == "per block")
    video, (context, _) = sizes.video_of(config), sizes.latents_of(geometry, torch.float32)
    encode, forecast = (torch.compile(encoder), torch.compile(head)) if way == "whole model" else (encoder, head)
    start, wall = cpu_seconds(), time.perf_counter()
    with torch.no_grad():
        encode(video)
    forecast(context).square().mean().backward()
    print(cpu_seconds() - start, time.perf_counter() - wall)


def measure(way: str, encoder_layers: int, head_layers: int) -> tuple[float, float]:
    """CPU seconds and wall seconds of one way, in a new process."""
    layers = ["--layers", str(encoder_layers), str(head_layers)]
    command = [sys.executable, "-m", "benchmarks.startup", "--way", way, *layers]
    with tempfile.TemporaryDirectory() as cache:
        output = subprocess.check_output(command, text=True, env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache})
    cpu, wall = map(float, output.split()[-2:])
    return cpu, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs=2, default=(24, 12), metavar=("ENCODER", "HEAD"))
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # used when this program starts itself
    options = parser.parse_args()
    if options.way:
        compile_once(options.way, *options.layers)
        return
    for layers in ((4, 2), tuple(options.layers)):
        (cpu, wall), (whole_cpu, whole_wall) = (measure(way, *layers) for way in WAYS)
        print(
            f"{layers[0]} + {layers[1]} layers: per block {cpu:.1f} s of CPU ({wall:.1f} s), "
            f"whole model {whole_cpu:.1f} s ({whole_wall:.1f} s): {whole_cpu / cpu:.1f} times"
        )


if __name__ == "__main__":
    main()
