"""Annotation files."""

import os

import pytest

from flperf.data.annotations import Annotations, class_name, number_classes, read_annotations, read_labels
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


def test_spaces_at_the_ends_belong_to_a_name_if_there_is_such_a_file(tmp_path):
    for name in (" lead.mp4", "trail.mp4 ", "both.mp4", " both.mp4 "):
        (tmp_path / name).touch()
    (tmp_path / "a.csv").write_text(" lead.mp4 0\ntrail.mp4  0\n both.mp4  0\nboth.mp4 0 \n  none.mp4 \t 0\r\n")
    paths = read_annotations(str(tmp_path / "a.csv"), "dataset.train", None).paths
    assert [path.removeprefix(f"{tmp_path}/") for path in paths] == [
        *(" lead.mp4", "trail.mp4 ", " both.mp4 ", "both.mp4", "none.mp4")
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


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a b.mp4\t1", "separated by a space, not by a tab"),
        ("a.mp4\t1\ttrain", "separated by a space, not by a tab"),
        ("a.mp4,1", "separated by a space, not by a comma"),
        ("a b.mp4, 1", "separated by a space, not by a comma"),
        ("a.mp4;1", "separated by a space, not by a comma"),
        ('"a b.mp4" 1', "without quotes"),
        ('"a b.mp4 1', "without quotes"),
        ('a.mp4 "1"', "without quotes"),
        ("a.mp4 1 train", "only two columns"),
        ("a.mp4 1 7", "only two columns"),
        ("a.mp4 1 0.5", "only two columns"),
        ("path label", "a header, remove it"),
        ("path,label", "a header, remove it"),
        ("label,youtube_id,time_start,time_end,split,is_cc", "flperf index --kinetics .*a.csv --videos DIR"),
        ("youtube_id,time_start,time_end,split", "flperf index --kinetics .*a.csv --videos DIR"),
        ("riding a bike,0347ZoDXyP0,95,105,train", "flperf index --kinetics .*a.csv --videos DIR"),
        ('[{"id": "1", "label": "a"}]', "flperf index --ssv2 LABELS_DIR --videos DIR"),
        ("path,label,codec,frames", "an index"),
        ("path,label,shard,row", "dataset.kind=kinetics_400_cached"),
        ("out_path,label", "dataset.kind=kinetics_400_cached"),
        ("a.mp4 -1", "class index '-1' is negative"),
        ("a.mp4 1.0", "class index '1.0' is no whole number"),
        ("a.mp4 900000000", "class index 900000000 is above"),
    ],
)
def test_a_row_in_another_format_says_what_to_do(tmp_path, row, message):
    (tmp_path / "a.csv").write_text(f"b.mp4 0\n{row}\n")
    with pytest.raises(UserError, match=rf"a\.csv: row 2: .*{message}"):
        read_annotations(str(tmp_path / "a.csv"), "dataset.train", None)


@pytest.mark.parametrize(
    "name", ["x,", '"x"', "x.mp4 3", "x\ty", b"caf\xe9.mp4", "x y'", "[x", "a, b.mp4", "x.mp4 -1 z"]
)
def test_a_path_that_looks_like_a_mistake_is_taken_if_the_file_exists(tmp_path, name):
    name = os.fsdecode(name)
    (tmp_path / name).write_text("")
    (tmp_path / "a.csv").write_bytes(os.fsencode(f"{name} 1\n"))
    assert read_annotations(str(tmp_path / "a.csv"), "dataset.train", None).paths == [str(tmp_path / name)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a\n2 b\n", "class 0 is missing"),
        ("0 a\n1 b\n", "class 2 is missing; the classes of the clips begin at 1: number the classes from 0"),
        ("0 a\n2 b\n3 c\n", "class 1 is missing"),
        ("0 a\n1 b\n2 c\n1 d\n", "row 4: class 1 is 'd' here but 'b' above"),
        ("0,a\n", "row 1: .* columns are separated by a space"),
        ("0\ta\n", "row 1: .* columns are separated by a space"),
        ("index name\n", "row 1: .* class index 'index' is no whole number"),
        ("0 a\n900000000 b\n", "row 2: .* class index 900000000 is above"),
        ("0 a\n-1 b\n", "row 2: .* class index '-1' is negative"),
        ("0\n", "row 1: .* there is no name"),
        ("", "holds no classes"),
    ],
)
def test_mistakes_in_a_labels_file_are_named(tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=f"labels.csv: .*{message}"):
        read_labels(str(tmp_path / "labels.csv"), [Annotations(["a", "b"], [1, 2])])


def test_classes_that_begin_at_1_are_said_to_lack_0(caplog):
    assert read_labels(None, [Annotations(["a", "b"], [1, 2]), Annotations([], [])]) == ["0", "1", "2"]
    assert "class 0 is missing" in caplog.text
    caplog.clear()
    read_labels(None, [Annotations(["a"], [1]), Annotations(["b"], [0])])
    assert not caplog.text


def test_a_class_gets_its_number_only_from_one_name(tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("0 a_b\n1 a b\n2 c_d\n3 e\n4 e\n")
    assert number_classes([], {"a b", "a_b", "c d"}, str(labels)) == {"a_b": 0, "a b": 1, "c d": 2}
    with pytest.raises(UserError, match="class e: .*labels.csv gives this name to several classes"):
        number_classes([], {"e"}, str(labels))


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("riding a bike", "riding a bike"),
        (" a ", "\\x20a\\x20"),
        ("caf\udce9\n", "caf\\xe9\\n"),
        ("  ", "\\x20\\x20"),
        ("", ""),
    ],
)
def test_a_class_name_is_one_line_of_utf8(name, written):
    assert class_name(name) == written
