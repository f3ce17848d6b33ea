"""The order of samples, and the frames that are read."""

import itertools

import numpy as np
import pytest
import torch

from flperf.data.samplers import BatchShare, FrameSampling, TrainingSampler, ValidationSampler


def samples(sampler, first_step, share, steps):
    """Micro batches of some steps, flattened step by step."""
    batches = sampler.batches(first_step, share)
    return [[request for _ in range(share.accumulation_steps) for request in next(batches)] for _ in range(steps)]


@pytest.mark.parametrize("size", [1, 5, 37])
@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_every_clip_comes_once_an_epoch(size, batch_size):
    steps = -(-3 * size // batch_size)
    stream = [
        request.clip
        for step in samples(TrainingSampler(size, 1), 0, BatchShare(0, 1, batch_size, batch_size), steps)
        for request in step
    ]
    for epoch in range(3):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_and_seeds_differ():
    def epoch(seed, number):
        return [TrainingSampler(50, seed).request(sample).clip for sample in range(50 * number, 50 * number + 50)]

    assert epoch(0, 0) != epoch(0, 1) != epoch(1, 1)


@pytest.mark.parametrize("world_size,micro_batch_size", [(1, 8), (1, 2), (2, 4), (2, 2), (4, 1), (8, 1)])
def test_layout_changes_nothing_of_a_step(world_size, micro_batch_size):
    sampler = TrainingSampler(11, 3)
    reference = samples(sampler, 0, BatchShare(0, 1, 8, 8), 5)
    ranks = [samples(sampler, 0, BatchShare(rank, world_size, micro_batch_size, 8), 5) for rank in range(world_size)]
    for step in range(5):
        seen = list(itertools.chain(*(rank[step] for rank in ranks)))
        assert sorted(seen, key=lambda request: request.sample) == reference[step]


def test_resuming_needs_only_the_step():
    sampler, share = TrainingSampler(240_000, 0), BatchShare(1, 2, 4, 16)
    assert samples(sampler, 0, share, 7)[5:] == samples(TrainingSampler(240_000, 0), 5, share, 2)
    far = samples(sampler, 10**9, share, 1)[0]
    assert [request.sample for request in far] == [16 * 10**9 + p for p in (4, 5, 6, 7, 12, 13, 14, 15)]


def test_attempts_take_the_next_clips_of_the_same_epoch():
    sampler = TrainingSampler(7, 0)
    epoch = [sampler.request(sample).clip for sample in range(7)]
    assert [sampler.request(5, attempt).clip for attempt in range(8)] == [epoch[(5 + a) % 7] for a in range(8)]
    assert len({sampler.request(5, attempt).uniform for attempt in range(8)}) == 8


def test_start_numbers_are_uniform():
    numbers = torch.tensor([TrainingSampler(10, 0).request(sample).uniform for sample in range(4000)])
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / 4000) ** 0.5  # four standard errors


@pytest.mark.parametrize("size,world_size,batch_size", [(1, 1, 4), (10, 1, 4), (10, 3, 2), (12, 2, 3), (13, 2, 3)])
def test_validation_reads_each_clip_once_and_every_rank_as_often(size, world_size, batch_size):
    sampler = ValidationSampler(size)
    ranks = [
        list(sampler.batches(BatchShare(rank, world_size, 1, world_size), batch_size)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch) for batches in ranks for batch in batches} == {batch_size}
    requests = [request for batches in ranks for batch in batches for request in batch]
    assert sorted(request.clip for request in requests if request.valid) == list(range(size))
    assert {request.clip for request in requests if not request.valid} <= {size - 1}


@pytest.mark.parametrize("length", [1, 3, 16, 17, 40])
def test_frames_are_within_the_file(length):
    for start in ("first", "center", "random"):
        frame_sampling = FrameSampling(n_frames=6, stride=3, start=start)
        for uniform in (0.0, 0.5, 0.999999):
            frames = frame_sampling.frames(np.arange(length), uniform)
            assert len(frames) == 6 and frames[0] >= 0 and frames[-1] <= length - 1
            assert all(b - a == 3 or b == length - 1 for a, b in itertools.pairwise(frames))
    assert FrameSampling(6, 3, "center").frames(np.arange(40), 0.0)[0] == 12
    assert {FrameSampling(6, 3, "random").frames(np.arange(18), u / 100)[0] for u in range(100)} == {0, 1, 2}
