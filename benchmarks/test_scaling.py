"""Weak scaling from one process to two on this machine, one thread each, and the share of an update that goes into
communication.

    python -m pytest benchmarks/test_scaling.py

An update is a whole one: clips drawn, encoder, head, backward, optimizer. One process and two take turns, so that
what else the machine does touches both. The efficiency is the time of one over that of two, which take twice the
clips; communication is the time in which a collective is under way, waiting for the other process included.
"""

from functools import partial

import pytest

from benchmarks.recording import MIN_ROUNDS
from benchmarks.scaling import UPDATES, workers
from benchmarks.sizes import BATCH, DTYPE, ON_GPU, configuration, encoder_of, geometry_of, head_of
from flperf.models.flops import encoder_flops, head_flops

STAGES = 1, 3  # the default, and the one that communicates most


@pytest.fixture(scope="module")
def flops() -> int:
    """Of a clip."""
    config = configuration("dit")
    encoder = encoder_of(config, DTYPE, False)
    geometry = geometry_of(config, encoder)
    return encoder_flops(encoder, geometry, config.backbone.encode) + 3 * head_flops(
        head_of(config, geometry, DTYPE, False), geometry, True
    )


@pytest.fixture(scope="module")
def one():
    """One process, at the default stage: by itself it has nothing to divide or to gather."""
    with workers(1) as group:
        yield group


@pytest.fixture(scope="module")
def two():
    with workers(2, STAGES) as group:
        yield group


@pytest.mark.skipif(ON_GPU, reason="two processes share the cores of a CPU; GPUs need one each")
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
