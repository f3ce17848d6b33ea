"""Annotation files."""

import pytest

from flperf.data.annotations import Annotations, read_annotations, read_labels
from flperf.errors import UserError


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


def test_a_byte_order_mark_and_extra_spaces_are_not_part_of_a_path(tmp_path):
    (tmp_path / "a.csv").write_text("a.mp4  1\nb c.mp4 0\n", encoding="utf-8-sig")
    assert read_annotations(str(tmp_path / "a.csv"), "dataset.train", None).paths == [
        f"{tmp_path}/a.mp4",
        f"{tmp_path}/b c.mp4",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "a.mp4 0\nCafé.mp4 0\n".encode("latin-1"),
        "a.mp4 0\n".encode("utf-16"),
        b"\x00\x00\x00\x20ftypisom\xff\xfe",
        b"a.mp4 0\n" * 1000 + b"b\0.mp4 0\n",
    ],
)
def test_files_that_are_not_utf8_are_named(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.csv: (row \d+: )?is not UTF-8 text; .* dataset\.train"):
        read_annotations(str(tmp_path / "a.csv"), "dataset.train", None)
    (tmp_path / "labels.csv").write_bytes(content.replace(b"a.mp4 0", b"0 a").replace(b".mp4 0", b" 1"))
    with pytest.raises(UserError, match=r"labels\.csv: (row \d+: )?(is not UTF-8 text; .* dataset\.labels|expected)"):
        read_labels(str(tmp_path / "labels.csv"), [Annotations([], [])])


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


@pytest.mark.parametrize("file", [None, "/no/such.csv"])
def test_a_missing_csv_names_the_key(file):
    with pytest.raises(UserError, match="dataset.train: .* point it to"):
        read_annotations(file, "dataset.train", None)
