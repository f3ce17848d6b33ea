"""Text files that users hand over: every reader ends in one line for whatever else such a file holds."""

import os

import pytest

from flperf.config import Config, Dataset
from flperf.data import open_dataset
from flperf.data.annotation_formats import read_kinetics, read_ssv2
from flperf.data.annotations import Annotations, read_annotations, read_labels
from flperf.data.index import HEADER, read_index
from flperf.data.latent_files import read_manifest
from flperf.data.latent_shards import COLUMNS
from flperf.data.shard_cache import open_shards
from flperf.data.text_files import csv_rows, has_header, text_rows
from flperf.errors import UserError, printable


def ssv2(file: str) -> None:
    read_ssv2(os.path.dirname(file), ".", "train", None)


READERS = {  # reader → (a header or beginning that it accepts, name of the file)
    "annotations": (lambda file: read_annotations(file, "dataset.train", None), "", "a.csv"),
    "labels": (lambda file: read_labels(file, [Annotations([], [])]), "", "a.csv"),
    "index": (lambda file: read_index(file, None), ",".join(HEADER) + "\n", "a.csv"),
    "files": (lambda file: read_manifest(file, "dataset.train", "out_path", None), "out_path,label\n", "a.csv"),
    "shards": (lambda file: open_shards(file, Config(), None), ",".join(COLUMNS) + "\n", "a.csv"),
    "kinetics": (lambda file: read_kinetics(file, ".", None, None), "label,youtube_id,time_start,time_end\n", "a.csv"),
    "ssv2": (ssv2, "", "labels.json"),
}
CONTENTS = {
    "empty": b"",
    "blank": b"\n\n",
    "latin-1": "Café 0,é\n".encode("latin-1"),
    "utf-16": "0 a\n".encode("utf-16"),
    "NUL": b"0 a\0\n",
    "late NUL": b"0 a\n" * 2000 + b"0 \0\n",
    "huge label": b"a.mp4,900000000,0,0\na.mp4 900000000\n900000000 a\n",
    "endless label": b"a.mp4," + b"9" * 5000 + b",0,0\n",
    "negative label": b"a.mp4,-1,0,0\n-1 -1\n",
    "quotes": b'"a.mp4" "0"\n',
    "unclosed quote": b'"' + b"a.mp4 0\n" * 40000,
    "long cell": b"x" * 200_000 + b",0\n",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_such_file_is_named_in_one_line(reader, content, tmp_path):
    read, beginning, name = READERS[reader]
    file = tmp_path / name
    for start in {"", beginning}:
        file.write_bytes(start.encode() + CONTENTS[content])
        with pytest.raises(UserError, match=name) as caught:
            read(str(file))
        assert "\n" not in printable(str(caught.value)) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("reader", READERS)
def test_a_folder_a_missing_and_an_unreadable_file_are_named(reader, tmp_path, monkeypatch):
    read, beginning, name = READERS[reader]
    (tmp_path / "folder" / name).mkdir(parents=True)
    for path in (tmp_path / "folder" / name, tmp_path / name):
        with pytest.raises(UserError, match=name):
            read(str(path))
    (tmp_path / name).write_text(beginning)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=f"{name}.* (cannot be read: Permission denied|is not a manifest)"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_is_no_part_of_a_manifest(mark, tmp_path):
    (tmp_path / "a.csv").write_text(f"{mark}out_path,label\nb.pt,3\n", encoding="utf-8")
    assert read_manifest(str(tmp_path / "a.csv"), "dataset.train", "out_path", None).labels == [3]
    (tmp_path / "a.csv").write_text(f"{mark}{','.join(COLUMNS)}\nb.mp4,3,0,0\n", encoding="utf-8")
    with pytest.raises(UserError, match="shard_00000.* does not exist"):  # the row was read
        open_shards(str(tmp_path / "a.csv"), Config(), None)
    with pytest.raises(UserError, match="shard_00000.* does not exist"):
        open_dataset(Config(dataset=Dataset(kind="kinetics_400_cached", train=str(tmp_path / "a.csv"))), None, 0)


def test_rows_keep_bytes_that_are_not_utf8_and_count_from_one(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'a,b\r\n\r\ncaf\xe9.mp4,"x\r\ny"\n')
    rows = list(csv_rows(str(tmp_path / "a.csv"), "--csv", "a file"))
    assert rows == [(1, ["a", "b"]), (3, ["caf\udce9.mp4", "x\r\ny"])]
    assert os.fsencode(rows[1][1][0]) == b"caf\xe9.mp4"
    assert [row for row, _ in text_rows(str(tmp_path / "a.csv"), "--csv", "a file")] == [1, 3, 4]


def test_only_a_readable_file_has_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    assert has_header(str(tmp_path / "a.csv"), ["a", "b"]) and not has_header(str(tmp_path / "a.csv"), ["a"])
    assert not has_header(str(tmp_path), ["a"]) and not has_header(None, ["a"])


def test_messages_show_names_as_one_printable_line():
    assert printable("caf\udce9\n\r\x1b[1m é\u2028") == "caf\\xe9\\n\\r\\x1b[1m é\\u2028"
