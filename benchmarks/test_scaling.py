"""Measures weak scaling from one process to two on this machine, one thread each, and the share of communication.

    python -m pytest benchmarks/test_scaling.py

An update is complete: clips are drawn and encoded, then forward, backward and optimizer. One process and two take
turns, so that other work on the machine affects both. The efficiency is the time of one process over that of two,
which take twice the clips. Communication is the time during which a collective is in progress, waiting for the other
process included.
"""

from functools import partial

import pytest

from benchmarks.recording import MIN_ROUNDS
from benchmarks.scaling import UPDATES, workers
from benchmarks.sizes import BATCH, DTYPE, ON_GPU, configuration, encoder_of, geometry_of, head_of
from flperf.models.flops import encoder_flops, head_flops

STAGES = 1, 3  # the default stage, and the one with most collectives


@pytest.fixture(scope="module")
def flops() -> int:
    """FLOPs of one clip."""
    config = configuration("dit")
    encoder = encoder_of(config, DTYPE, False)
    geometry = geometry_of(config, encoder)
    return encoder_flops(encoder, geometry, config.backbone.encode) + 3 * head_flops(
        head_of(config, geometry, DTYPE, False), geometry, True
    )


@pytest.fixture(scope="module")
def one():
    """One process at the default stage; alone, all stages are the same."""
    with workers(1) as group:
        yield group


@pytest.fixture(scope="module")
def two():
    with workers(2, STAGES) as group:
        yield group


@pytest.mark.skipif(ON_GPU, reason="two processes can share a CPU but need a GPU each")
@pytest.mark.benchmark(group="weak scaling, two processes")
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes(benchmark, record, flops, one, two, stage):
    clips = UPDATES * 2 * BATCH
    update = partial(two.update, stage)
    record(
        update, "clips", clips, flops=clips * flops, dtype=DTYPE, rounds=MIN_ROUNDS, beside={"one process": one.update}
    )
    benchmark.extra_info["efficiency"] = benchmark.extra_info["times as fast as one process"]
    benchmark.extra_info["communication"] = update(profiled=True)["communication"]
