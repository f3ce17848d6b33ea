"""The PyAV decoder: exact frames, faults replaced at their place, threads that end."""

import logging
import os
import threading
import time

import numpy as np
import pytest
import torch

from flperf.config import Backbone
from flperf.data import dali, pyav
from flperf.data.annotations import Annotations
from flperf.data.prefetch import BadClip, read_ahead
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import BatchShare, FrameSampling, TrainingSampler, ValidationSampler
from flperf.errors import UserError

PREPROCESSING = Preprocessing.of(Backbone(architecture={"crop_size": 48}))
CPU = torch.device("cpu")
READABLE = [
    "h264.mp4",
    "portrait.mp4",
    "short.mp4",
    "hevc.mp4",
    "mpeg4.avi",
    "vp9.webm",
    "vp9_short.webm",
    "vp8.webm",
    "mjpeg.avi",
]
READABLE += ["h264.ts", "variable.mkv"]


def read(folder, names, sampler=None, share=None, window=None, threads=2):
    annotations = Annotations([str(folder / name) for name in names], list(range(len(names))))
    sampler = sampler or TrainingSampler(len(names), 0)
    batches = sampler.batches(0, share or BatchShare(0, 1, 4, 4))
    return pyav.read_batches(
        batches, sampler, annotations, window or FrameSampling(4, 3, "random"), PREPROCESSING, threads, 2, CPU
    )


@pytest.mark.parametrize(("kept_bytes", "resized_bytes"), [(pyav.KEPT_BYTES, pyav.RESIZED_BYTES), (0, 0)])
@pytest.mark.parametrize("name", READABLE)
@pytest.mark.parametrize(
    "n_frames,stride,uniform", [(1, 1, 0.0), (8, 1, 0.7), (7, 5, 0.99), (12, 2, 0.4), (80, 1, 0.5)]
)
def test_frames_are_those_of_plain_decoding(
    videos, decode_all, monkeypatch, name, n_frames, stride, uniform, kept_bytes, resized_bytes
):
    """Whether the packets are kept, as those of usual clips are, or demuxed again, as those of long videos; and
    whether frames are resized together, as small ones are, or each by itself."""
    monkeypatch.setattr(pyav, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(pyav, "RESIZED_BYTES", resized_bytes)
    window = FrameSampling(n_frames, stride, "random")
    out = torch.full((n_frames, 48, 48, 3), 77, dtype=torch.uint8)
    pyav.read_clip(str(videos / name), window, uniform, PREPROCESSING, out)
    everything = decode_all(videos / name)
    expected = everything[window.frames(len(everything), uniform)]
    assert torch.equal(out, PREPROCESSING.apply(torch.from_numpy(expected)))


BROKEN = [
    "empty.webm",
    "text.mp4",
    "truncated.mp4",
    "damaged.webm",
    "audio.mp4",
    "missing.mp4",
    "stray.ts",
    "no_frames.mp4",
    ".",
]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_bad_clips(videos, name):
    with pytest.raises(BadClip) as caught:
        pyav.read_clip(
            str(videos / name),
            FrameSampling(30, 2, "first"),
            0.0,
            PREPROCESSING,
            torch.empty(30, 48, 48, 3, dtype=torch.uint8),
        )
    path, reason = caught.value.args
    assert path == str(videos / name) and reason


def test_a_bad_clip_is_replaced_by_the_next_and_logged_once(videos, caplog):
    names = ["h264.mp4", "missing.mp4", "vp9.webm", "mjpeg.avi", "with a space.mp4"]
    sampler = TrainingSampler(5, 0)
    with caplog.at_level(logging.WARNING):
        stream = read(videos, names, sampler)
        batches = [next(stream) for _ in range(5)]  # 20 samples: the missing one is due four times
    for batch in batches:
        for sample, clip, label in zip(batch.sample.tolist(), batch.clip.tolist(), batch.label.tolist(), strict=True):
            due = sampler.draw(sample).clip
            assert clip == label == (sampler.draw(sample, 1).clip if due == 1 else due)
    skipped = [fault for batch in batches for fault in batch.skipped]
    assert [path for path, _ in skipped] == [str(videos / "missing.mp4")] * 4
    assert "No such file" in skipped[0][1]
    assert len([record for record in caplog.records if "missing.mp4" in record.message]) == 1


def test_a_file_that_vanishes_is_replaced(videos, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes((videos / "h264.mp4").read_bytes())
    stream = read(tmp_path, ["a.mp4", "b.mp4"])
    next(stream)
    os.remove(tmp_path / "a.mp4")
    later = [next(stream) for _ in range(6)][-1]
    assert later.clip.tolist() == [1, 1, 1, 1] and later.valid.all()


def test_validation_fills_up_and_marks_what_it_could_not_read(videos):
    names = ["h264.mp4", "missing.mp4", "vp9.webm"]
    batches = list(_validate(videos, names))
    assert [batch.clip.tolist() for batch in batches] == [[0, 1], [2, 2]]
    assert [batch.valid.tolist() for batch in batches] == [[True, False], [True, False]]
    assert [batch.video.shape for batch in batches] == [(2, 4, 48, 48, 3)] * 2
    assert batches[0].video[0].any() and not batches[0].video[1].any()


@pytest.mark.parametrize("decoder", [pyav, dali])
def test_a_missing_folder_in_a_sorted_csv_does_not_end_validation(videos, decoder, caplog):
    """Forty clips in a row are a tenth of the split; the others are all read, in order, in batches of one shape."""
    names = [f"gone/{row}.webm" if 20 <= row < 60 else "vp9_short.webm" for row in range(400)]
    with caplog.at_level(logging.WARNING):
        batches = list(_validate(videos, names, decoder, batch_size=8))
    assert {batch.video.shape for batch in batches} == {(8, 4, 48, 48, 3)}
    assert torch.cat([batch.clip for batch in batches]).tolist() == list(range(400))
    valid = torch.cat([batch.valid for batch in batches])
    assert valid.tolist() == ["gone" not in name for name in names]
    filled = torch.cat([batch.video for batch in batches]).flatten(1).any(1)
    assert torch.equal(filled, valid)
    assert [path for batch in batches for path, _ in batch.skipped] == [
        str(videos / name) for name in names if "gone" in name
    ]
    assert "40 of 400 clips can't be read and are left out: " in caplog.text and "and 20 more" in caplog.text


def test_a_reader_that_takes_no_more_than_it_needs_hears_what_was_left_out(videos, caplog):
    """As encoding does, which knows how many batches there are."""
    stream = _validate(videos, ["missing.webm", "vp9.webm", "vp8.webm", "mjpeg.avi"])
    next(stream)
    next(stream)
    stream.close()
    assert "1 of 4 clips can't be read and are left out: " in caplog.text


@pytest.mark.parametrize("decoder", [pyav, dali])
def test_half_a_split_is_too_much(videos, decoder):
    names = ["vp9_short.webm"] * 4 + ["missing.webm"] * 5
    with pytest.raises(UserError, match=r"more than half of the 9 clips can't be read: .*missing\.webm"):
        list(_validate(videos, names, decoder))


def _validate(folder, names, decoder=pyav, batch_size=2):
    annotations, sampler = (
        Annotations([str(folder / name) for name in names], [0] * len(names)),
        ValidationSampler(len(names)),
    )
    batches = sampler.batches(BatchShare(0, 1, batch_size, batch_size), batch_size)
    return decoder.read_batches(batches, sampler, annotations, FrameSampling(4, 3, "center"), PREPROCESSING, 2, 2, CPU)


def test_a_dataset_of_missing_files_ends_with_a_list(videos):
    with pytest.raises(UserError, match=r"can't be read: .*gone_\d\.mp4: No such file"):
        next(read(videos, [f"gone_{index}.mp4" for index in range(9)]))


def test_more_bad_clips_than_good_end_the_run(videos):
    stream = read(videos, ["h264.mp4", "text.mp4", "empty.webm", "missing.mp4"])
    with pytest.raises(UserError, match=r"of the first \d+ clips can't be read: .*text\.mp4"):
        for _ in range(20):
            next(stream)


def test_runs_agree_and_ranks_share_the_batch(videos):
    names = ["h264.mp4", "vp9.webm", "mjpeg.avi", "text.mp4", "hevc.mp4"]
    whole = read(videos, names, share=BatchShare(0, 1, 4, 4), threads=3)
    halves = [read(videos, names, share=BatchShare(rank, 2, 2, 4), threads=1) for rank in (0, 1)]
    for _ in range(4):
        together, parts = next(whole), [next(half) for half in halves]
        assert torch.equal(together.video, torch.cat([part.video for part in parts]))
        assert torch.equal(together.sample, torch.cat([part.sample for part in parts]))


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flperf-data")]


def wait_for_threads_to_end():
    deadline = time.time() + 10
    while data_threads() and time.time() < deadline:
        time.sleep(0.02)
    assert not data_threads()


@pytest.mark.parametrize("how", ["close", "drop", "exception"])
def test_threads_end_with_the_iterator(videos, how):
    stream = read(videos, ["h264.mp4", "vp9.webm"])
    next(stream)
    assert data_threads()
    if how == "close":
        stream.close()
    elif how == "drop":
        del stream
    else:
        _fail_in_a_loop(stream)
        del stream
    wait_for_threads_to_end()


def _fail_in_a_loop(stream):
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            raise KeyboardInterrupt


def test_no_more_than_the_stated_batches_are_in_flight():
    submitted = []
    stream = read_ahead(range(100), lambda pool, task: submitted.append(task), threads=1, ahead=3)
    next(stream)
    assert submitted == [0, 1, 2, 3]
    next(stream)
    assert submitted == [0, 1, 2, 3, 4]
    stream.close()


def test_decoding_threads_compute_alone_and_leave_torch_as_it_was():
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


def test_file_handles_stay_few(videos):
    stream = read(
        videos,
        ["h264.mp4", "text.mp4", "empty.webm", "vp9.webm", "mjpeg.avi", "vp8.webm", "portrait.mp4"],
        share=BatchShare(0, 1, 8, 8),
    )
    next(stream)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        next(stream)
    assert len(os.listdir("/proc/self/fd")) <= before + 4  # two decoders may have a file open each


def test_batches_hold_what_they_say(videos):
    batch = next(read(videos, ["h264.mp4", "vp9.webm"], window=FrameSampling(4, 3, "random")))
    assert batch.video.dtype == torch.uint8 and batch.video.shape == (4, 4, 48, 48, 3) and batch.latents is None
    assert (
        batch.label.dtype == batch.clip.dtype == batch.sample.dtype == torch.int64 and batch.valid.dtype == torch.bool
    )
    assert np.array_equal(batch.sample, [0, 1, 2, 3])
