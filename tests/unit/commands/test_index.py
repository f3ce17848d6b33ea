"""`flperf index`: its sources, and its exit status."""

import csv
import json
import os
import re
import shutil

import pytest

from flperf.commands.common import run_command
from flperf.commands.index import index
from flperf.data.index import read_index


def run(*arguments) -> str | int | None:
    """The exit status, or the message that stands for 1."""
    try:
        run_command(index, [str(argument) for argument in arguments])
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def sources(videos, tmp_path):
    """The options of each source, for a folder in which one clip is `clip`, of any suffix; two more are missing."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "clips.csv").write_text("videos/7_000001_000011.mp4 0\n")
    (tmp_path / "k.csv").write_text("label,youtube_id,time_start,time_end,split\na,7,1,11,train\nb,8,1,11,train\n")
    entries = [{"id": "7_000001_000011", "template": "a"}, {"id": "8", "template": "b"}]
    (tmp_path / "labels/labels.json").write_text(json.dumps({"a": "0", "b": "1"}))
    (tmp_path / "labels/train.json").write_text(json.dumps(entries))
    official = ["--videos", tmp_path / "videos", "--split", "train"]
    return {
        "csv": ["--csv", tmp_path / "clips.csv"],
        "folder": ["--folder", tmp_path / "videos"],
        "kinetics": ["--kinetics", tmp_path / "k.csv", *official],
        "ssv2": ["--ssv2", tmp_path / "labels", *official],
    }


@pytest.mark.parametrize("source", ["csv", "folder", "kinetics", "ssv2"])
def test_the_exit_status_says_whether_anything_is_usable(source, sources, videos, tmp_path, capsys):
    clip, out = tmp_path / "videos/7_000001_000011.mp4", tmp_path / "index.csv"
    clip.write_text("no video")
    assert "none of its files is usable" in run(*sources[source], "--out", out)
    assert "unusable: " in capsys.readouterr().out
    with open(out, newline="") as lines:
        assert all(row["error"] for row in csv.DictReader(lines))
    shutil.copy(videos / "h264.mp4", clip)
    assert run(*sources[source], "--out", out) == 0
    assert read_index(str(out), None).paths[0] == str(clip) and "1 of" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["folder", "kinetics", "ssv2"])
def test_a_folder_without_videos_is_one_line_and_no_index(source, sources, tmp_path):
    message = run(*sources[source], "--out", tmp_path / "index.csv")
    assert message.startswith("flperf: --") and "\n" not in message and "holds no" in message
    assert not (tmp_path / "index.csv").exists() and not (tmp_path / "index.csv.partial").exists()


@pytest.mark.parametrize("source", ["folder", "kinetics", "ssv2"])
def test_labels_are_written_once_and_alike(source, sources, videos, tmp_path):
    (tmp_path / "videos/a").mkdir()
    shutil.copy(videos / "h264.mp4", tmp_path / "videos/a/7_000001_000011.mp4")
    labels = tmp_path / "new/labels.csv"
    assert run(*sources[source], "--labels", labels, "--out", tmp_path / "index.csv") == 0
    assert labels.read_text() == ("0 a\n" if source == "folder" else "0 a\n1 b\n")
    labels.write_text("0 first\n1 a\n2 b\n")
    assert run(*sources[source], "--labels", labels, "--out", tmp_path / "index.csv") == 0
    assert labels.read_text() == "0 first\n1 a\n2 b\n"
    assert read_index(str(tmp_path / "index.csv"), None).labels == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinetics", "k.csv"], "--videos: is not set"),
        (["--ssv2", "labels"], "--videos: is not set"),
        (["--csv", "clips.csv", "--videos", "videos"], "--videos: belongs to --kinetics and --ssv2"),
        (["--folder", "videos", "--split", "train"], "--split: belongs to --kinetics and --ssv2"),
        (["--folder", ""], "--folder: there is no folder"),
        (["--folder", "k.csv"], "--folder: k.csv is not a folder"),
        (["--csv", "videos"], "--csv: videos is a folder"),
        (["--csv", "k.csv"], "k.csv: row 1: .* `flperf index --kinetics k.csv --videos DIR`"),
        (["--csv", "labels/train.json"], "train.json: row 1: .* `flperf index --ssv2 LABELS_DIR"),
        (["--kinetics", "clips.csv", "--videos", "videos"], "clips.csv: row 1: is not the header of Kinetics' CSV"),
        (["--csv", "clips.csv", "--labels", "videos"], "--labels: videos is a folder"),
        (["--folder", "full", "--labels", "k.csv/labels.csv"], "k.csv.*(can't|cannot) be written"),
        (["--folder", "full", "--labels", "videos"], "--labels: videos is a folder"),
        (["--csv", "clips.csv", "--out", "k.csv"], "--out: k.csv exists and is not an index"),
        (["--csv", "clips.csv", "--out", "/dev/null"], "--out: /dev/null exists and is not an index"),
        (["--csv", "clips.csv", "--out", ""], "--out:  is a folder"),
        (["--csv", "clips.csv", "--out", "k.csv/index.csv"], "--out: k.csv/index.csv can't be written"),
    ],
)
def test_mistakes_are_one_line(options, message, sources, videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    shutil.copy(videos / "h264.mp4", tmp_path / "full/1.mp4")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code = run(*options, *([] if "--out" in options else ["--out", "index.csv"]))
    assert isinstance(code, str) and "\n" not in code
    assert re.search(message, code)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_target_that_cannot_be_written_is_named(sources, videos, tmp_path, monkeypatch):
    shutil.copy(videos / "h264.mp4", tmp_path / "videos/1.mp4")
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "index.csv can't be written: the folder" in run(*sources["folder"], "--out", tmp_path / "index.csv")
    monkeypatch.undo()
    (tmp_path / "index.csv.partial").mkdir()
    assert "index.csv.partial: cannot be written" in run(*sources["folder"], "--out", tmp_path / "index.csv")
