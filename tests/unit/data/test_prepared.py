"""Prepared files are recognised wherever they lie, and refused by a backbone that needs other frames."""

import json
import shutil
from dataclasses import replace

import av
import pytest
import torch
from odd_videos import encode

from flperf.config import Backbone
from flperf.data.clip_writer import Plan, write_clip
from flperf.data.prepared import IDENTITY, Preparation, check_set
from flperf.data.preprocessing import Preprocessing, padded
from flperf.data.pyav import PyAVReader, opened
from flperf.data.samplers import ClipRequest, FrameSampling
from flperf.data.shared_memory import Place
from flperf.data.unreadable import BadClip
from flperf.data.worker_messages import Reading, Task
from flperf.data.worker_process import read_clip
from flperf.errors import UserError

SMALL, LARGE = (Preprocessing.of(Backbone(architecture={"crop_size": size})) for size in (32, 64))  # resize: 36, 73
WINDOW = FrameSampling(2, 1, "first")
EXACT = Preprocessing.of(Backbone(kind="dinov3", architecture={"image_size": 48}))


def prepare(folder, name, plan):
    source = encode(folder / "source.mp4", "libx264", 6)  # 64 x 96
    with opened(str(source)) as file:
        write_clip(file, folder / name, plan)
    return folder / name


def read(path, preprocessing):
    reader = PyAVReader([str(path)], WINDOW, preprocessing)
    out = torch.empty(reader.shape, dtype=torch.uint8)
    reader.read(ClipRequest(0, 0, 0, 0.0, valid=True), out)
    return out


def with_comment(source, target, comment):
    """A copy with another comment."""
    with av.open(str(source)) as original, av.open(str(target), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream_from_template(original.streams.video[0])
        for packet in original.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    return target


@pytest.mark.parametrize(("plan", "other"), [(Plan(SMALL), LARGE), (Plan(LARGE), SMALL), (Plan(SMALL), EXACT)])
def test_frames_for_another_backbone_are_refused(tmp_path, plan, other):
    """A copy too, which no description of a set lies beside."""
    prepared = prepare(tmp_path, "prepared.mp4", plan)
    read(prepared, plan.preprocessing)
    read(prepared, replace(plan.preprocessing, mean=(0.5, 0.5, 0.5)))  # normalisation is the encoder's
    shutil.copy(prepared, tmp_path / "copy.mp4")
    for path in (prepared, tmp_path / "copy.mp4"):
        with pytest.raises(UserError, match=r"\.mp4: was prepared for frames resized to .*; this backbone needs them "):
            read(path, other)


def test_dali_gets_what_is_left_to_do(tmp_path):
    """A worker tells the process that decodes with DALI, which has not opened the file."""
    prepared, reading = prepare(tmp_path, "prepared.mp4", Plan(LARGE)), Reading(WINDOW, LARGE, "cuda", reusing=True)
    task = Task(str(prepared), 0.0, Place(0, 0, 0), with_dali=True)
    with opened(str(prepared)) as file:
        answer = read_clip(reading, task, file, torch.empty(0))
        assert answer.indices == [0, 1] and answer.colours is None
        frames = torch.randint(0, 256, (2, *padded(LARGE.size), 3), dtype=torch.uint8)
        assert torch.equal(answer.preprocessing.apply(frames), frames)
        with pytest.raises(UserError, match="was prepared for frames"):
            read_clip(Reading(WINDOW, SMALL, "cuda"), task, file, torch.empty(0))


def test_a_short_side_serves_backbones_that_need_no_more(tmp_path):
    prepared = prepare(tmp_path, "short.mp4", Plan(SMALL, 50))
    for preprocessing in (SMALL, EXACT):
        assert read(prepared, preprocessing).shape[1:3] == preprocessing.size
    with pytest.raises(UserError, match=r"prepared with --short-side 50; .* would be enlarged: .* --short-side 73"):
        read(prepared, LARGE)
    whole = prepare(tmp_path, "whole.mp4", Plan(SMALL, 80))  # the original has 64, and was enlarged by LARGE, too
    difference = read(whole, LARGE).float() - read(tmp_path / "source.mp4", LARGE).float()
    assert difference.abs().mean() < 8


def test_a_set_is_refused_before_anything_else(tmp_path):
    def describe(plan, **more):
        (tmp_path / IDENTITY).write_text(json.dumps(plan.of_set().as_json() | more))

    index = str(tmp_path / "train.csv")
    check_set(index, "dataset.train", LARGE)  # no description, no prepared set
    check_set(None, "dataset.train", LARGE)
    describe(Plan(SMALL))
    check_set(index, "dataset.train", SMALL)
    with pytest.raises(UserError, match=r"^dataset\.train: .*train\.csv: was prepared for frames .*36, cropped to 32"):
        check_set(index, "dataset.train", LARGE)
    describe(Plan(SMALL, 50), shrunk=False)  # all files are smaller than that
    check_set(index, "dataset.train", LARGE)
    describe(Plan(SMALL, 50))
    with pytest.raises(UserError, match="would be enlarged"):
        check_set(index, "dataset.train", LARGE)
    for content, reason in (("{", "is not valid JSON"), ("[1]", "does not describe"), ("{}", "doesn't say")):
        (tmp_path / IDENTITY).write_text(content)
        with pytest.raises(UserError, match=f"{IDENTITY}: .*{reason}") as error:
            check_set(index, "dataset.train", LARGE)
        assert "\n" not in str(error.value)


def test_comments_of_others_are_no_preparation(tmp_path):
    source = encode(tmp_path / "source.mp4", "libx264", 6)
    for comment in ("made by a camera", '{"a": 1}', "flperf_prepared"):
        read(with_comment(source, tmp_path / "commented.mp4", comment), SMALL)


WRONG = [{"resize": "a"}, {"crop": 3}, {"shown": 5}, {"shown": [0, 2]}, {"shown": None}, {"short_side": [1, 2]}]


def test_a_damaged_or_unknown_preparation_is_no_clip(tmp_path):
    prepared = prepare(tmp_path, "prepared.mp4", Plan(SMALL))
    good = Plan(SMALL).of_set().as_json()
    for comment, reason in (
        ('{"flperf_prepared": ', "damaged"),
        (json.dumps(good)[:-5], "damaged"),
        (json.dumps(good | {"flperf_prepared": 2}), "another version"),
        ('{"flperf_prepared": 1}', "doesn't say"),
        *((json.dumps(good | wrong), "doesn't say") for wrong in WRONG),
        (json.dumps(good | {"shown": [64, 64]}), "its frames are 32 x 32, but were prepared as 64 x 64"),
    ):
        with pytest.raises(BadClip, match=reason):
            read(with_comment(prepared, tmp_path / "commented.mp4", comment), SMALL)


def test_what_is_written_is_read_again():
    for plan in (Plan(SMALL), Plan(EXACT), Plan(LARGE, 100)):
        preparation = plan.of_frames((200, 300))[0]
        assert Preparation.parse(json.loads(json.dumps(preparation.as_json()))) == preparation
