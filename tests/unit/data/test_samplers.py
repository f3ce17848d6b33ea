"""The order of samples, and the frames that are read."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from flperf.data.annotations import SourceClips
from flperf.data.samplers import TIME_TOLERANCE, BatchShare, FrameSampling, TrainingSampler, ValidationSampler


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


RATES = [24, 25, 30, 60, 240, Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)]
UNITS = [None, Fraction(1, 1000), Fraction(1, 600), Fraction(1, 90_000), Fraction(1, 12_800)]  # of the times in a file


def frame_times(length, rate=Fraction(25), unit=None, rounding=round):
    """Times of frames at a constant rate, as a file with this unit has them."""
    exact = [index / Fraction(rate) for index in range(length)]
    stamps = exact if unit is None else [rounding(time / unit) * unit for time in exact]
    return np.array([float(stamp - stamps[0]) for stamp in stamps])


@pytest.mark.parametrize("length", [1, 3, 16, 17, 40])
def test_frames_are_within_the_file(length):
    times = frame_times(length)
    for start in ("first", "center", "random"):
        frame_sampling = FrameSampling(n_frames=6, stride=3, start=start)
        for uniform in (0.0, 0.5, 0.999999):
            frames = frame_sampling.frames(times, uniform)
            assert len(frames) == 6 and frames[0] >= 0 and frames[-1] <= length - 1
            assert all(b - a == 3 or b == length - 1 for a, b in itertools.pairwise(frames))
    assert FrameSampling(6, 3, "center").frames(frame_times(40), 0.0)[0] == 12
    assert {FrameSampling(6, 3, "random").frames(frame_times(18), u / 100)[0] for u in range(100)} == {0, 1, 2}


@pytest.mark.parametrize("rounding", [round, math.floor, math.ceil], ids=lambda function: function.__name__)
@pytest.mark.parametrize("unit", UNITS, ids=str)
@pytest.mark.parametrize("rate", RATES, ids=str)
def test_a_rate_of_the_file_over_a_whole_number_is_a_stride(rate, unit, rounding):
    """At the file's own rate every frame comes once, at half of it every second one, from every start, however the file
    rounds its times."""
    times = frame_times(300, rate, unit, rounding)
    for stride in (1, 2, 5):
        # half a frame, by which the centre may be off, is near the tolerance at 240 frames a second
        for start in ("first", "random") if rate == 240 else ("first", "center", "random"):
            by_time = FrameSampling(24, 99, start, fps=float(rate / stride))
            by_count = FrameSampling(24, stride, start)
            for uniform in (0.0, 0.37, 0.5, 0.999999):
                assert by_time.frames(times, uniform) == by_count.frames(times, uniform), (stride, start, uniform)
        assert by_time.is_short(23 * stride, times[23 * stride - 1]) and by_count.is_short(23 * stride, 0.0)
        assert not by_time.is_short(23 * stride + 1, times[23 * stride]) and not by_count.is_short(23 * stride + 1, 0.0)


def test_a_rate_with_two_decimals_is_near_enough():
    times = frame_times(200, Fraction(24000, 1001), Fraction(1, 1000))
    for fps in (23.98, 23.976):
        assert FrameSampling(64, 1, "first", fps=fps).frames(times, 0.0) == list(range(64))


@pytest.mark.parametrize("seed", range(20))
def test_frames_by_time_are_the_last_ones_shown(seed):
    """On a variable frame rate, at any fps: the definition, frame by frame."""
    random = np.random.default_rng(seed)
    times = np.concatenate([[0.0], random.choice([0.008, 0.02, 0.04, 0.5], 400, p=[0.3, 0.3, 0.3, 0.1]).cumsum()])
    fps = random.choice([5.0, 12.5, 29.97, 60.0])
    for start in ("first", "center", "random"):
        frame_sampling = FrameSampling(16, 2, start, fps=fps)
        frames = frame_sampling.frames(times, random.uniform())
        shown = times[frames[0]] + np.arange(16) / fps
        assert frames == [max(i for i, time in enumerate(times) if time <= at + TIME_TOLERANCE) for at in shown]
        assert shown[-1] <= times[-1] + TIME_TOLERANCE
        assert not frame_sampling.is_short(len(times), times[-1])


def test_random_starts_are_all_frames_at_which_the_window_fits():
    times = np.array([0.0, 0.1, 0.15, 0.7, 0.8, 1.3, 1.4])  # 0.5 s fit from 0.8 s on at the latest
    frame_sampling = FrameSampling(3, 1, "random", fps=4.0)
    starts = [frame_sampling.frames(times, u / 1000)[0] for u in range(1000)]
    assert [starts.count(frame) for frame in range(5)] == [200] * 5 and len(starts) == 1000
    assert FrameSampling(3, 1, "center", fps=4.0).frames(times, 0.0) == [2, 2, 2]  # from 0.45 s: between 0.15 and 0.7 s


@pytest.mark.parametrize("fps", [None, 12.5])
def test_a_file_shorter_than_the_window_repeats_its_last_frame(fps):
    for length in (1, 2, 45, 126):
        times = frame_times(length)
        for start in ("first", "center", "random"):
            frame_sampling = FrameSampling(64, 2, start, fps)
            assert frame_sampling.is_short(length, times[-1])
            assert frame_sampling.frames(times, 0.9) == [min(2 * i, length - 1) for i in range(64)]
    assert not frame_sampling.is_short(127, frame_times(127)[-1])


def test_more_frames_a_second_than_the_file_has_repeat_frames():
    frame_sampling = FrameSampling(8, 1, "first", fps=50.0)
    assert frame_sampling.frames(frame_times(10), 0.0) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert not frame_sampling.is_short(5, 4 / 25)  # the time is there


# ----------------------------------------------------------------------------------------------------------------
# several sources

MIXTURES = {
    "two": ((7, 2.0), (5, 1.0)),
    "one clip beside many": ((1, 9.0), (40, 1.0)),
    "many": tuple((1 + number % 4, 1.0 + number % 3) for number in range(30)),
}


def mixed(sources, seed=0) -> TrainingSampler:
    parts = tuple(SourceClips(f"{number}.csv", size, weight) for number, (size, weight) in enumerate(sources))
    return TrainingSampler(sum(size for size, _ in sources), seed, parts)


def of_sources(sampler, sources, count) -> list[list[int]]:
    """The clips of the first samples by source, counted from the source's first clip."""
    firsts = [sum(size for size, _ in sources[:number]) for number in range(len(sources))]
    found = [[] for _ in sources]
    for sample in range(count):
        clip = sampler.request(sample).clip
        source = max(number for number, first in enumerate(firsts) if first <= clip)
        found[source].append(clip - firsts[source])
    return found


@pytest.mark.parametrize("sources", MIXTURES.values(), ids=MIXTURES)
def test_every_clip_comes_once_in_each_pass_over_its_source(sources):
    for (size, _), clips in zip(sources, of_sources(mixed(sources), sources, 2000), strict=True):
        passes = [clips[first : first + size] for first in range(0, len(clips) - size + 1, size)]
        assert len(passes) > 1 and all(sorted(each) == list(range(size)) for each in passes)
        assert size < 3 or len({tuple(each) for each in passes}) > 1  # another order in each pass


@pytest.mark.parametrize("world_size,micro_batch_size", [(1, 12), (1, 3), (3, 4), (3, 2), (12, 1)])
def test_layout_changes_nothing_of_a_mixture(world_size, micro_batch_size):
    sampler = mixed(MIXTURES["two"])
    reference = samples(sampler, 0, BatchShare(0, 1, 12, 12), 12)
    ranks = [
        samples(mixed(MIXTURES["two"]), 0, BatchShare(rank, world_size, micro_batch_size, 12), 12)
        for rank in range(world_size)
    ]
    for step in range(12):
        seen = list(itertools.chain(*(rank[step] for rank in ranks)))
        assert sorted(seen, key=lambda request: request.sample) == reference[step]


@pytest.mark.parametrize("step", [1, 5, 10, 1000])
def test_a_mixture_resumes_at_any_step(step):
    sources, share = MIXTURES["many"], BatchShare(1, 2, 4, 16)
    assert samples(mixed(sources), step, share, 2) == samples(mixed(sources), step - 1, share, 3)[1:]
    assert samples(mixed(sources, seed=1), step, share, 2) != samples(mixed(sources), step, share, 2)


GOLDEN = {  # seed: (clip, uniform) of (sample, attempt) among 1000 clips
    0: [(459, 0.9115362334466431), (607, 0.11652464664022943), (144, 0.028714292274805597), (651, 0.6299223915722151)],
    2**40 + 5: [
        (577, 0.6349996683113891), (491, 0.982637258325691), (29, 0.48132197035152713), (906, 0.25098419837379005)
    ],
}  # fmt: skip


@pytest.mark.parametrize("seed", GOLDEN)
@pytest.mark.parametrize("sources", [(), (SourceClips("a.csv", 1000, 0.3),)], ids=["no sources", "one source"])
def test_the_stream_of_one_file_stays_that_of_existing_runs(seed, sources):
    sampler = TrainingSampler(1000, seed, sources)
    requests = [sampler.request(*place) for place in ((0, 0), (999, 0), (1000, 0), (123_456_789, 3))]
    assert [(request.clip, request.uniform) for request in requests] == GOLDEN[seed]


def test_a_source_has_the_order_it_would_have_alone_if_it_is_first():
    sources = MIXTURES["two"]
    alone = [TrainingSampler(7, 0).request(sample).clip for sample in range(100)]
    assert of_sources(mixed(sources), sources, 300)[0][:100] == alone


def test_replacements_are_of_the_same_source():
    """So that shares hold where one source has unreadable clips; a source of one clip has no replacement."""
    sampler, firsts = mixed(MIXTURES["two"]), (range(7), range(7, 12))
    for sample in range(100):
        clips = [sampler.request(sample, attempt).clip for attempt in range(sampler.candidates(sample))]
        assert sorted(clips) in [list(clips) for clips in firsts]
    assert {mixed(MIXTURES["one clip beside many"]).candidates(sample) for sample in range(100)} == {1, 40}


def test_a_small_source_does_not_make_the_order_of_a_large_one_expensive(monkeypatch):
    """One clip changes its order at each sample; the order of the other source is drawn once a pass."""
    draw, drawn = TrainingSampler._permutation, []
    monkeypatch.setattr(TrainingSampler, "_permutation", lambda self, *of: drawn.append(of) or draw(self, *of))
    sampler = mixed(((1, 9.0), (400, 1.0)))
    for sample in range(3000):
        sampler.request(sample)
    assert [of for of in drawn if of[0] == 1] == [(1, 0)]


def test_first_clips_are_in_the_proportions_of_the_mixture():
    assert TrainingSampler(5, 0).first_clips(3) == [0, 1, 2]
    assert TrainingSampler(5, 0).first_clips(9) == [0, 1, 2, 3, 4]
    assert mixed(((100, 1.0), (100, 3.0))).first_clips(8) == [0, 1, *range(100, 106)]
    assert mixed(((100, 1.0), (2, 1.0))).first_clips(8) == [0, 1, 2, 3, 100, 101]
