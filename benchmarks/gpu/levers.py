"""What each lever of the step gives: our step against the same step with it, against the usual way and a strong one.

All on ready clips at the reference size, in turns. A ratio above 1 means that ours is faster.
"""

import os
import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from itertools import islice

import torch

from benchmarks import sizes
from benchmarks.gpu.section import Section
from benchmarks.gpu.turns import ReadyStep, Step, free, in_turns, timed
from benchmarks.gpu.videos import reading_of, video_configuration, write_kinds
from benchmarks.levers import inductor
from benchmarks.recording import seconds_of
from benchmarks.strong_way import StrongStep, video_batches
from benchmarks.usual_way import UsualStep

COMPILING = 0 if sizes.QUICK else 60  # seconds that a whole model may take to compile


def measure(section: Section) -> None:
    section.attempt("attention", partial(attention_operators, section))
    for regime in ("dit", "predictor"):
        section.attempt(f"levers, {regime}", partial(measure_regime, section, regime))
        free()


def measure_regime(section: Section, regime: str) -> None:
    ours = ReadyStep(regime, section)
    against = partial(compare, section, regime, ours)
    compiled = not sizes.QUICK
    against(
        "a strong way",
        lambda: StrongStep(ours.run.config, ours.run.geometry, ours.videos(), sizes.DEVICE, compile=compiled),
        needs=COMPILING,
        then=partial(more_of_strong_way, section, regime, ours),
    )
    against(
        "backward passes in kernels of flperf's own",
        lambda: ReadyStep(regime, section, "model.fused_kernels=true"),
        needs=0 if sizes.QUICK else 20,
    )
    if regime == "dit":
        against("the usual way, bf16 autocast", lambda: usual(ours, autocast=True))
        against("ours, joint", lambda: ReadyStep(regime, section, mode="joint"))
        against("the usual way, fp32", lambda: usual(ours, autocast=False), needs=0 if sizes.QUICK else 40)
    else:
        against("max-autotune", lambda: autotuned(section, regime), needs=COMPILING)
        against("the usual way, bf16 autocast", lambda: usual(ours, autocast=True))


def compare(
    section: Section,
    regime: str,
    ours: ReadyStep,
    name: str,
    build: Callable[[], Step],
    needs: float = 0,
    then: Callable[[Step], None] | None = None,
) -> None:
    """Time a way in turns with ours, and write its row; `then` measures more with it."""

    def measure_way() -> None:
        step = build()
        first = seconds_of(step)  # compiles
        step()
        own, theirs, ratio = in_turns(ours, step, *((1, 1) if sizes.QUICK else (3, 3)))
        section.row(
            table, name,
            ours_ms=own, this_ms=theirs, ratio=ratio, first_step_s=first, clips_per_s=1e3 * sizes.BATCH / theirs,
        )  # fmt: skip
        if then:
            then(step)

    def measure_if_it_fits() -> None:
        try:
            measure_way()
        except torch.OutOfMemoryError:
            section.row(table, name, this_ms="out of memory")

    table = f"levers, {regime}"
    section.attempt(f"{regime}, {name}", measure_if_it_fits, needs)
    free()  # here, where nothing holds the way any more


def usual(ours: ReadyStep, autocast: bool) -> UsualStep:
    return UsualStep(ours.run.config, ours.run.geometry, ours.videos(), sizes.DEVICE, autocast)


def autotuned(section: Section, regime: str) -> ReadyStep:
    """Compiled with max-autotune, which the first steps do."""
    with inductor(max_autotune=True):
        return ReadyStep(regime, section)


def more_of_strong_way(section: Section, regime: str, ours: ReadyStep, step: StrongStep) -> None:
    """Its encoder against ours, and its step on video files."""
    encoders = (lambda: ours.run.training_latents(ours.batch), lambda: step.latents_of(ours.batch.video))
    own, theirs, ratio = in_turns(*encoders, *((1, 1) if sizes.QUICK else (2, 3)))
    section.row(f"levers, {regime}", "a strong way, encoder alone", ours_ms=own, this_ms=theirs, ratio=ratio)
    if regime == "dit":
        strong_on_videos(section, regime, step)


def strong_on_videos(section: Section, regime: str, step: StrongStep) -> None:
    """The strong way's step on video files, read by decord in worker processes."""
    if not find_spec("decord"):
        section.results.note(section.name, "the strong way on video files: left out, decord is not installed")
        return

    def measure_videos() -> None:
        kind, paths = next(iter(write_kinds(section.folder).items()))
        reading = reading_of(video_configuration(regime, paths, section.folder))
        workers = max(1, len(os.sched_getaffinity(0)) - 2)
        ready, held = timed(step, 2), step.batches
        step.batches = video_batches(paths, *reading, sizes.BATCH, workers)
        for _ in islice(step.batches, 0 if sizes.QUICK else 2 * workers):  # those that are read ahead
            pass
        timed(step, 2)
        taken, ready_ms = timed(step, 2 if sizes.QUICK else 8), statistics.median(ready)
        step.batches = held
        section.row(
            "the strong way on video files", kind,
            ms=statistics.median(taken), mean_ms=statistics.mean(taken), ready_ms=ready_ms,
            speed_to_ready=ready_ms / statistics.mean(taken),
            clips_per_s=1e3 * sizes.BATCH / statistics.mean(taken),
        )  # fmt: skip

    section.attempt("the strong way on video files", measure_videos, needs=0 if sizes.QUICK else 15)


def attention_operators(section: Section) -> None:
    """Milliseconds of attention, forward and backward, in turns, at the widths of the encoder and of the heads."""
    from benchmarks.test_attention import TOKENS, attention, ways

    def times(functions: dict[str, Callable], heads: int, width: int) -> dict[str, list[float]]:
        shape = (sizes.BATCH, TOKENS, heads, width)
        inputs = [
            torch.randn(shape, device=sizes.DEVICE, dtype=sizes.DTYPE, requires_grad=True) for _ in range(3)
        ]  # fmt: skip
        gradient = torch.randn_like(inputs[0])
        steps = {name: (lambda f=function: f(*inputs).backward(gradient)) for name, function in functions.items()}
        found: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(6):
            for name, step in steps.items():
                found[name] += timed(step, 3)[1:]
        return found

    for heads, width in [(16, 64), (8, 128)] if sizes.ON_GPU else [(3, 64)]:
        medians = {
            name: statistics.median(found[2:])
            for name, found in times({"ours": attention, **ways()}, heads, width).items()
        }
        for name, ms in medians.items():
            section.row(f"attention, {heads} heads of {width}", name, ms=ms, ratio=ms / medians["ours"])
