"""Annotations and the order of samples."""

import itertools

import pytest
import torch

from flperf.config import Config, Dataset
from flperf.data import open_dataset, prepare_dataset
from flperf.data.annotations import Annotations, read_annotations, read_labels
from flperf.data.samplers import BatchShare, FrameSampling, TrainingSampler, ValidationSampler
from flperf.errors import UserError


def samples(sampler, first_step, share, steps):
    """Micro batches of some steps, flattened step by step."""
    batches = sampler.batches(first_step, share)
    return [[draw for _ in range(share.accumulation_steps) for draw in next(batches)] for _ in range(steps)]


@pytest.mark.parametrize("size", [1, 5, 37])
@pytest.mark.parametrize("batch_size", [1, 4, 40])
def test_every_clip_comes_once_an_epoch(size, batch_size):
    steps = -(-3 * size // batch_size)
    stream = [
        draw.clip
        for step in samples(TrainingSampler(size, 1), 0, BatchShare(0, 1, batch_size, batch_size), steps)
        for draw in step
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
        assert sorted(seen, key=lambda draw: draw.sample) == reference[step]


def test_resuming_needs_only_the_step():
    sampler, share = TrainingSampler(240_000, 0), BatchShare(1, 2, 4, 16)
    assert samples(sampler, 0, share, 7)[5:] == samples(TrainingSampler(240_000, 0), 5, share, 2)
    far = samples(sampler, 10**9, share, 1)[0]
    assert [draw.sample for draw in far] == [16 * 10**9 + p for p in (4, 5, 6, 7, 12, 13, 14, 15)]


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
    draws = [draw for batches in ranks for batch in batches for draw in batch]
    assert sorted(draw.clip for draw in draws if draw.valid) == list(range(size))
    assert {draw.clip for draw in draws if not draw.valid} <= {size - 1}


@pytest.mark.parametrize("length", [1, 3, 16, 17, 40])
def test_windows_stay_in_the_file(length):
    for start in ("first", "center", "random"):
        window = FrameSampling(n_frames=6, stride=3, start=start)
        for uniform in (0.0, 0.5, 0.999999):
            frames = window.frames(length, uniform)
            assert len(frames) == 6 and frames[0] >= 0 and frames[-1] <= length - 1
            assert all(b - a == 3 or b == length - 1 for a, b in itertools.pairwise(frames))
    assert FrameSampling(6, 3, "center").frames(40, 0.0)[0] == 12
    assert {FrameSampling(6, 3, "random").start_frame(18, u / 100) for u in range(100)} == {0, 1, 2}


def test_annotations(tmp_path):
    (tmp_path / "a.csv").write_text("x/my clip.mp4 3\n/abs/b.webm 0\n\nc.mp4 3\n")
    annotations = read_annotations(str(tmp_path / "a.csv"), "dataset.train", None)
    assert annotations.paths == [f"{tmp_path}/x/my clip.mp4", "/abs/b.webm", f"{tmp_path}/c.mp4"]
    assert annotations.labels == [3, 0, 3]
    assert len(read_annotations(str(tmp_path / "a.csv"), "dataset.train", 2)) == 2
    assert read_labels(None, [annotations]) == ["0", "1", "2", "3"]
    (tmp_path / "labels.csv").write_text("0 riding a bike\n1 b\n2 c\n3 d\n")
    assert read_labels(str(tmp_path / "labels.csv"), [annotations])[0] == "riding a bike"


def test_a_clip_named_twice_is_kept_once_and_counted(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("a.mp4 1\nb.mp4 0\na.mp4 1\na.mp4 01\n")
    annotations = read_annotations(str(tmp_path / "a.csv"), "dataset.train", None)
    assert [path.rpartition("/")[2] for path in annotations.paths] == ["a.mp4", "b.mp4"] and annotations.labels == [
        1,
        0,
    ]
    assert "a.csv: 2 rows repeat a clip" in caplog.text


def test_a_byte_order_mark_and_spare_spaces_are_no_part_of_a_path(tmp_path):
    (tmp_path / "a.csv").write_text("a.mp4  1\nb c.mp4 0\n", encoding="utf-8-sig")
    assert read_annotations(str(tmp_path / "a.csv"), "dataset.train", None).paths == [
        f"{tmp_path}/a.mp4",
        f"{tmp_path}/b c.mp4",
    ]


@pytest.mark.parametrize(
    "content", ["Café.mp4 0\n".encode("latin-1"), "a.mp4 0\n".encode("utf-16"), b"\x00\x00\x00\x20ftypisom\xff\xfe"]
)
def test_what_is_no_utf8_is_said(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv: is not UTF-8 text; .* dataset\.train"):
        read_annotations(str(tmp_path / "a.csv"), "dataset.train", None)
    with pytest.raises(UserError, match=r"a\.csv: is not UTF-8 text; .* dataset\.labels"):
        read_labels(str(tmp_path / "a.csv"), [Annotations([], [])])


@pytest.mark.parametrize(
    "text,row",
    [
        ("a.mp4 1\nb.mp4\n", 2),
        ("a.mp4,1\n", 1),
        ("a.mp4 x\n", 1),
        ("a.mp4 1\n\na.mp4 2\n", 3),
        ("a.mp4 1\nb.mp4 20000000\n", 2),
        ("a.mp4 " + "9" * 5000, 1),
    ],
)
def test_bad_rows_are_named(tmp_path, text, row):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(UserError, match=rf"bad\.csv: row {row}: "):
        read_annotations(str(tmp_path / "bad.csv"), "dataset.train", None)


def test_labels_must_cover_the_classes(tmp_path):
    (tmp_path / "a.csv").write_text("a.mp4 2\n")
    (tmp_path / "labels.csv").write_text("0 a\n1 b\n")
    annotations = read_annotations(str(tmp_path / "a.csv"), "dataset.train", None)
    with pytest.raises(UserError, match="every class from 0 to 2"):
        read_labels(str(tmp_path / "labels.csv"), [annotations])


def test_missing_files_are_named_before_a_backbone_is_fetched(tmp_path):
    """`prepare_dataset` is called first of all; of two missing files, the training clips' is named."""
    config = Config(
        dataset=Dataset(kind="kinetics_400", train=str(tmp_path / "train.csv"), validation="no.csv", labels="none.csv")
    )
    for name in ("train", "validation", "labels"):
        with pytest.raises(UserError, match=rf"dataset\.{name}: there is no file"):
            prepare_dataset(config)
        (tmp_path / f"{name}.csv").write_text("0 zero\n")
        setattr(config.dataset, name, str(tmp_path / f"{name}.csv"))
    prepare_dataset(config)
    with pytest.raises(UserError, match=r"dataset\.train: is not set"):
        open_dataset(Config(dataset=Dataset(kind="kinetics_400", validation="no.csv")), None, 0)


@pytest.mark.parametrize("file", [None, "/no/such.csv"])
def test_a_missing_csv_names_the_key(file):
    with pytest.raises(UserError, match="dataset.train: .* point it to"):
        read_annotations(file, "dataset.train", None)
