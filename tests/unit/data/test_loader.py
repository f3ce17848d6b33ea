"""Batches read ahead in threads: their order, their memory, unreadable and short clips, and threads that end."""

import logging
import threading
import time

import numpy as np
import pytest
import torch

from flperf.data.annotations import SourceClips
from flperf.data.loader import Reader, load_batches, read_ahead
from flperf.data.samplers import BatchShare, FrameSampling, TrainingSampler, ValidationSampler
from flperf.data.unreadable import BadClip, shortage
from flperf.errors import UserError

CPU = torch.device("cpu")


class NumberReader(Reader):
    """Clip i is i everywhere; those of `bad` can't be read, those of `short` have 45 frames."""

    field, shape, dtype = "latents", (2, 3, 3, 2), torch.float32

    def __init__(self, bad=(), short=(), short_clips="pad"):
        self.bad, self.short = set(bad), set(short)
        self.frame_sampling = FrameSampling(64, 2, "random", short_clips=short_clips)

    def read(self, request, slot):
        slot.fill_(request.clip)
        if request.clip in self.bad:
            raise BadClip(f"clip_{request.clip}", "it is bad")
        length = 45 if request.clip in self.short else 127
        return shortage(f"clip_{request.clip}", self.frame_sampling, np.arange(length) / 25)


def train(reader, size, share=None, threads=2, sources=()):
    sampler = TrainingSampler(size, 0, sources)
    requests = sampler.batches(0, share or BatchShare(0, 1, 4, 4))
    return load_batches(reader, requests, sampler, list(range(100, 100 + size)), threads, 2, CPU)


def validate(reader, size, batch_size=2):
    sampler = ValidationSampler(size)
    requests = sampler.batches(BatchShare(0, 1, batch_size, batch_size), batch_size)
    return load_batches(reader, requests, sampler, [0] * size, 2, 2, CPU)


def test_batches_hold_the_clips_of_the_order():
    batches, sampler = train(NumberReader(), 7), TrainingSampler(7, 0)
    for step in range(5):
        batch = next(batches)
        clips = [sampler.request(sample).clip for sample in range(4 * step, 4 * step + 4)]
        assert batch.clip.tolist() == clips and batch.label.tolist() == [100 + clip for clip in clips]
        assert batch.sample.tolist() == list(range(4 * step, 4 * step + 4)) and batch.valid.all()
        assert batch.latents.shape == (4, 2, 3, 3, 2) and batch.video is None and not batch.skipped
        assert (batch.latents == batch.clip[:, None, None, None, None]).all()
        types = {tensor.dtype for tensor in (batch.label, batch.clip, batch.sample)}
        assert types == {torch.int64} and batch.valid.dtype == torch.bool


def test_ranks_share_the_batch_of_one_process():
    whole = train(NumberReader([3]), 5, BatchShare(0, 1, 4, 4), threads=3)
    halves = [train(NumberReader([3]), 5, BatchShare(rank, 2, 2, 4), threads=1) for rank in (0, 1)]
    for _ in range(10):
        together, parts = next(whole), [next(half) for half in halves]
        for name in ("latents", "sample", "clip", "label"):
            assert torch.equal(getattr(together, name), torch.cat([getattr(part, name) for part in parts]))


def test_a_batch_that_is_not_released_is_never_overwritten():
    batches = train(NumberReader(), 50)
    kept = [next(batches) for _ in range(10)]
    for _ in range(10):
        next(batches).release()
    for batch in kept:
        assert (batch.latents == batch.clip[:, None, None, None, None]).all()


def test_released_memory_is_used_again():
    addresses = set()
    for _, batch in zip(range(40), train(NumberReader(), 50), strict=False):
        assert (batch.latents == batch.clip[:, None, None, None, None]).all()
        addresses.add(batch.latents.data_ptr())
        batch.release()
    assert len(addresses) <= 4  # two batches ahead, the current one, and one that was just released


def test_an_unreadable_clip_is_replaced_by_the_next_and_logged_once(caplog):
    sampler, batches = TrainingSampler(5, 0), train(NumberReader([1]), 5)
    read = [next(batches) for _ in range(5)]  # 20 samples, four of them of clip 1
    for batch in read:
        for sample, clip in zip(batch.sample.tolist(), batch.latents[:, 0, 0, 0, 0].int().tolist(), strict=True):
            first = sampler.request(sample).clip
            assert clip == (sampler.request(sample, 1).clip if first == 1 else first)
    assert [clip for batch in read for clip in batch.skipped] == [("clip_1", "it is bad")] * 4
    assert caplog.text.count("clip_1") == 1


def test_unreadable_clips_leave_the_shares_of_sources():
    sources = (SourceClips("a.csv", 4, 1.0), SourceClips("b.csv", 6, 1.0))
    batch = next(train(NumberReader([1, 2, 3]), 10, BatchShare(0, 1, 64, 64), sources=sources))
    assert batch.clip.tolist().count(0) == 32 and len(batch.skipped) > 0


def test_a_source_without_a_readable_clip_ends_the_run():
    sources = (SourceClips("a.csv", 2, 0.1), SourceClips("b.csv", 60, 1.0))
    with pytest.raises(UserError, match="^2 clips in a row can't be read: clip_[01]: it is bad; clip_[01]: it is bad$"):
        for _ in zip(range(20), train(NumberReader([0, 1]), 62, sources=sources), strict=False):
            pass


def test_validation_marks_and_zeros_what_it_could_not_read():
    batches = list(validate(NumberReader([1]), 3))
    assert [batch.clip.tolist() for batch in batches] == [[0, 1], [2, 2]]
    assert [batch.valid.tolist() for batch in batches] == [[True, False], [True, False]]
    assert not batches[0].latents[1].any()


def test_many_unreadable_clips_in_a_row_do_not_end_validation(caplog):
    """As of a missing folder in a sorted CSV: here a tenth of the split."""
    bad = range(20, 60)
    with caplog.at_level(logging.WARNING):
        batches = list(validate(NumberReader(bad), 400, batch_size=8))
    assert torch.cat([batch.clip for batch in batches]).tolist() == list(range(400))
    valid = torch.cat([batch.valid for batch in batches])
    assert valid.tolist() == [clip not in bad for clip in range(400)]
    content = torch.cat([batch.latents for batch in batches])[:, 0, 0, 0, 0]
    assert torch.equal(content, torch.arange(400) * valid.float())
    assert [path for batch in batches for path, _ in batch.skipped] == [f"clip_{clip}" for clip in bad]
    assert "40 of 400 clips can't be read and are left out: " in caplog.text and "and 20 more" in caplog.text


def test_closing_early_still_logs_what_was_left_out(caplog):
    """As encoding does, which knows how many batches there are."""
    batches = validate(NumberReader([0]), 4)
    next(batches)
    next(batches)
    batches.close()
    assert "1 of 4 clips can't be read and are left out: clip_0: it is bad" in caplog.text


def test_too_many_unreadable_clips_end_the_run():
    with pytest.raises(UserError, match=r"more than half of the 9 clips can't be read: clip_4: it is bad"):
        list(validate(NumberReader(range(4, 9)), 9))
    with pytest.raises(UserError, match=r"9 clips in a row can't be read: .*clip_\d"):
        next(train(NumberReader(range(9)), 9))
    with pytest.raises(UserError, match=r"of the first \d+ clips can't be read: .*clip_1"):
        for _, _ in zip(range(20), train(NumberReader([1, 2, 3]), 4), strict=False):
            pass


LACK = "its 45 frames end at 1.76 s: 23 distinct frames in a window of 127 frames (64 at stride 2)"


def test_a_padded_short_clip_is_read_and_counted_and_the_first_is_logged(caplog):
    batches = train(NumberReader(short=[1, 3]), 5)
    read = [next(batches) for _ in range(5)]  # 20 samples, four of each clip
    clips = torch.cat([batch.clip for batch in read])
    assert torch.equal(torch.cat([batch.latents for batch in read])[:, 0, 0, 0, 0].long(), clips)
    assert sorted(clips.tolist()) == sorted([*range(5)] * 4) and not any(batch.skipped for batch in read)
    assert sorted(clip for batch in read for clip in batch.short) == [("clip_1", LACK)] * 4 + [("clip_3", LACK)] * 4
    assert len(caplog.records) == 1 and LACK in caplog.text and "padded with its last frame" in caplog.text


def test_a_skipped_short_clip_is_replaced_like_an_unreadable_one_but_counted_apart(caplog):
    """Four fifths of the clips: unreadable ones would end the run."""
    sampler, batches = TrainingSampler(5, 0), train(NumberReader(short=[0, 1, 3, 4], short_clips="skip"), 5)
    for _ in range(40):
        batch = next(batches)
        assert batch.clip.tolist() == [2] * 4 and (batch.latents == 2).all() and not batch.skipped
        attempts = [[sampler.request(sample, attempt).clip for attempt in range(5)] for sample in batch.sample.tolist()]
        left_out = [f"clip_{clip}" for clips in attempts for clip in clips[: clips.index(2)]]
        assert [path for path, _ in batch.short] == left_out
    assert len(caplog.records) == 1 and "replaced by the next one" in caplog.text


def test_validation_leaves_out_skipped_short_clips(caplog):
    batches = list(validate(NumberReader(bad=[5], short=[0, 1, 2, 4], short_clips="skip"), 6))
    assert torch.cat([batch.valid for batch in batches]).tolist() == [False, False, False, True, False, False]
    assert [path for batch in batches for path, _ in batch.short] == [f"clip_{clip}" for clip in (0, 1, 2, 4)]
    assert "4 of 6 clips are shorter than the window and are left out" in caplog.text
    assert "1 of 6 clips can't be read and are left out" in caplog.text
    assert all(batch.valid.all() and batch.short for batch in validate(NumberReader(short=range(6)), 6))


def test_a_run_without_a_clip_of_the_window_ends_and_names_the_keys(caplog):
    keys = r"dataset.short_clips=pad, .* dataset.n_frames or dataset.stride, or .* dataset.fps"
    with pytest.raises(
        UserError, match=rf"9 clips in a row are shorter than the window; set {keys}.*clip_\d: {LACK[:20]}"
    ):
        next(train(NumberReader(short=range(9), short_clips="skip"), 9))
    with pytest.raises(UserError, match=rf"256 clips in a row are shorter than the window; set {keys}.*and 236 more"):
        next(train(NumberReader(short=range(900), short_clips="skip"), 900))
    with pytest.raises(UserError, match=r"9 clips in a row can't be read or are shorter than the window; set"):
        next(train(NumberReader(bad=[3], short={*range(9)} - {3}, short_clips="skip"), 9))
    with pytest.raises(UserError, match=rf"9 of 9 clips are shorter than the window; set {keys}"):
        list(validate(NumberReader(short=range(9), short_clips="skip"), 9))
    with pytest.raises(UserError, match=rf"8 of 9 clips are shorter .*; set {keys}.*; 1 can't be read: clip_3"):
        list(validate(NumberReader(bad=[3], short={*range(9)} - {3}, short_clips="skip"), 9))


def test_no_requests_are_no_batches():
    assert list(validate(NumberReader(), 0)) == []


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flperf-data")]


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_threads_end_with_the_iterator(how):
    before = set(data_threads())
    batches = train(NumberReader(), 9)
    next(batches)
    mine = set(data_threads()) - before
    assert mine
    if how == "close":
        batches.close()
    elif how == "exception":
        _fail_in_a_loop(batches)
    del batches
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()


def _fail_in_a_loop(batches):
    with pytest.raises(KeyboardInterrupt):
        for _ in batches:
            raise KeyboardInterrupt


def test_only_so_many_tasks_are_read_ahead():
    submitted = []
    stream = read_ahead(range(100), lambda pool, task: submitted.append(task), threads=1, ahead=3)
    next(stream)
    assert submitted == [0, 1, 2, 3]
    next(stream)
    assert submitted == [0, 1, 2, 3, 4]
    stream.close()


def test_torch_uses_one_thread_in_the_pool_and_as_many_as_before_elsewhere():
    before = torch.get_num_threads()
    stream = read_ahead(
        range(8),
        lambda pool, _: pool.submit(lambda: (time.sleep(0.01), torch.get_num_threads())[1]),
        threads=3,
        ahead=8,
    )
    assert {future.result() for future in stream} == {1}
    assert torch.get_num_threads() == before
    others = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert others == [before]
