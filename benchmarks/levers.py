"""Measures what each optimisation gains: the training step with and without it, in turns in one process.

    python -m benchmarks.levers                 # all, about ten minutes on two cores
    python -m benchmarks.levers fp32 threads    # those with one of these words in their names

The step is that of the predictor at sizes.STEP_SIZE, with batch 4, drawn clips and `encode: joint`. Times are medians
over the rounds, in milliseconds for 4 clips. The ratio is the median of the ratios of all rounds; above 1, ours is
faster.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import sizes
from benchmarks.recording import seconds_of
from benchmarks.training_step import OurStep, configuration
from benchmarks.usual_way import TransformersVJEPA2
from flperf.engine import engine
from flperf.models import backbones

ROUNDS, BATCH = 7, 4
Build = Callable[..., OurStep]  # of overrides


def inductor(**options: object) -> Callable:
    """Compile with options of Inductor. They are arguments of `torch.compile`, because global options would not
    separate the compiled graphs of two variants in one process."""
    return patch.object(
        torch,
        "compile",
        partial(torch.compile, options={key.replace("__", "."): value for key, value in options.items()}),
    )


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def transformers_layers(build: Build) -> OurStep:
    with patch.dict(backbones.BACKBONES, vjepa2=TransformersVJEPA2):
        return build()


def unfused_adamw(build: Build) -> OurStep:
    step = build()
    for group in step.run.engine.basic_optimizer.param_groups:
        group |= {"fused": False, "foreach": True}
    return step


def deepspeeds_norm(build: Build) -> OurStep:
    with patch.object(engine, "measure_gradients_together", lambda built: None):
        return build()


def compiled_with(build: Build, **options: object) -> OurStep:
    with inductor(**options):
        step = build()
        step()  # compiles
    return step


# Ours without an optimisation, or with one that it does not use.
VARIANTS: dict[str, Callable[[Build], OurStep]] = {
    "nothing (the noise)": lambda build: build(),
    "not compiled": lambda build: build("engine.compile=false"),
    "transformers' layers in the encoder": transformers_layers,
    "fp32": lambda build: build("engine.precision=fp32"),
    "AdamW unfused (foreach)": unfused_adamw,
    "ZeRO 0": lambda build: build("engine.zero_stage=0"),
    "frozen encoder weights (inductor's freezing)": lambda build: compiled_with(build, freezing=True),
    "max_autotune": lambda build: compiled_with(build, max_autotune=True),
    # Products by Triton where that is faster, with what follows as their epilogue; on a GPU.
    "products tuned (Triton with TMA, or cuBLAS)": lambda build: compiled_with(
        build,
        max_autotune_gemm=True,
        max_autotune_gemm_backends="ATEN,TRITON",
        triton__enable_persistent_tma_matmul=True,
    ),
    "backward passes in kernels of their own (CUDA)": lambda build: build("model.fused_kernels=true"),
    "DeepSpeed's norm of gradients": deepspeeds_norm,
    "one thread": lambda build: compiled_with(build, cpp__threads=1),
    "selective checkpointing": lambda build: build("model.activation_checkpointing=selective"),
    "batch 8": lambda build: build(f"trainer.batch_size={2 * BATCH}"),
}


def row(name: str, ours: OurStep, build: Build) -> str:
    """Time a variant in turns with ours; returns its row of the table."""
    setting = partial(threads, 1) if name == "one thread" else nullcontext
    with setting():
        other = VARIANTS[name](build)
        other()
    share = BATCH / other.run.share.batch_size
    pairs = []
    for _ in range(ROUNDS + 1):
        own = seconds_of(ours)
        with setting():
            pairs.append((own, share * seconds_of(other)))
    other.batches.close()
    # the first round warms up
    own, without = (1e3 * statistics.median(times) for times in zip(*pairs[1:], strict=True))
    ratio = statistics.median(b / a for a, b in pairs[1:])
    return f"| {name} | {own:.0f} | {without:.0f} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="words in the names of variants: " + "; ".join(VARIANTS))
    words = parser.parse_args().words
    torch._dynamo.config.recompile_limit = 64  # with frozen weights every block is compiled separately
    with tempfile.TemporaryDirectory() as folder:

        def build(*overrides: str) -> OurStep:
            return OurStep(
                configuration("predictor", "drawn", "joint", Path(folder), f"trainer.batch_size={BATCH}", *overrides)
            )

        ours = build()
        ours()
        print(f"threads: {torch.get_num_threads()} of {os.cpu_count()}, {sizes.DTYPE}\n")
        print("| ours with | ms, ours | ms, with this | ratio |\n| --- | --- | --- | --- |", flush=True)
        for name in VARIANTS:
            if not words or any(word in name for word in words):
                print(row(name, ours, build), flush=True)
        ours.batches.close()


if __name__ == "__main__":
    main()
