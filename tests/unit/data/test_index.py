"""The index of a dataset's files."""

import csv
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from flperf.data import index
from flperf.data.annotations import read_annotations
from flperf.data.video_folders import read_folder
from flperf.errors import UserError

BROKEN = ["empty.webm", "text.mp4", "truncated.mp4", "audio.mp4", "missing.mp4", "no_frames.mp4"]
GOOD = ["h264.mp4", "vp9.webm", "mjpeg.avi", "h264.ts"]


def index_csv(source, labels: Path | str | None, out, threads: int | None = None) -> list[index.Row]:
    """What `flperf index --csv` does."""
    index.check_options(str(out), {"--csv": str(source), "--labels": labels and str(labels)}, threads)
    return index.write_index(index.read_listed(str(source), labels and str(labels)), str(out), threads)


def index_folder(folder, labels, out) -> list[index.Row]:
    """What `flperf index --folder` does."""
    return index.write_index(read_folder(str(folder), labels and str(labels)), str(out))


@pytest.fixture
def annotated(videos, tmp_path):
    """A CSV beside the videos' folder that names good and broken files."""
    file = tmp_path / "clips with spaces.csv"
    (tmp_path / "my videos").symlink_to(videos)
    file.write_text("".join(f"my videos/{name} {row % 2}\n" for row, name in enumerate([*GOOD, *BROKEN])))
    return file


def test_an_index_has_the_properties_of_good_files_and_the_errors_of_others(annotated, tmp_path, decode_all, videos):
    rows = index_csv(annotated, None, tmp_path / "out" / "index.csv")
    assert [row.path.rpartition("/")[2] for row in rows] == [*GOOD, *BROKEN]  # in the order of the CSV
    for row in rows[: len(GOOD)]:
        frames = decode_all(videos / row.path.rpartition("/")[2])
        assert (row.frames, row.height, row.width, row.error) == (*frames.shape[:3], "")
        assert row.duration == pytest.approx(row.frames / row.frame_rate, rel=1e-3)
    assert all(row.error for row in rows[len(GOOD) :])
    text = index.summary(rows)
    assert f"{len(GOOD)} of {len(rows)} files are usable" in text and "h264 in yuv420p" in text


def test_training_reads_only_usable_files(annotated, tmp_path):
    out = tmp_path / "deeper" / "index.csv"
    index_csv(annotated, None, out)
    assert index.is_index(str(out)) and not index.is_index(str(annotated))
    annotations = index.read_index(str(out), None)
    assert len(annotations) == len(GOOD) and annotations.labels == [0, 1, 0, 1]
    assert all((tmp_path / path).is_file() for path in annotations.paths)
    assert len(index.read_index(str(out), 2)) == 2


def test_an_interrupted_index_goes_on(annotated, tmp_path, monkeypatch):
    out = tmp_path / "index.csv"
    whole = index_csv(annotated, None, out)
    lines = out.read_bytes().splitlines(keepends=True)
    out.unlink()
    (tmp_path / "index.csv.partial").write_bytes(b"".join(lines[:4]) + lines[4][:7])  # killed in the middle of a row
    probed, probe = [], index.probe_file
    monkeypatch.setattr(
        index, "probe_file", lambda folder, path, label: probed.append(path) or probe(folder, path, label)
    )
    assert index_csv(annotated, None, out) == whole
    assert len(probed) == len(whole) - 3
    assert not (tmp_path / "index.csv.partial").exists()
    with open(out, newline="") as file:
        assert len(list(csv.DictReader(file))) == len(whole)


def test_labels_corrected_meanwhile_are_the_new_ones(annotated, tmp_path):
    out = tmp_path / "index.csv"
    index_csv(annotated, None, out)
    out.rename(tmp_path / "index.csv.partial")
    annotated.write_text(re.sub(r" (\d)\n", lambda found: f" {int(found[1]) + 5}\n", annotated.read_text()))
    assert [row.label for row in index_csv(annotated, None, out)] == read_annotations(
        str(annotated), "--csv", None
    ).labels


def test_the_summary_says_how_long_files_are(videos):
    rows = [index.probe_file(videos, name, 0) for name in ("h264.mp4", "short.mp4", "vp9.webm", "empty.webm")]
    rows.append(replace(rows[0], path="long.mp4", frames=127, duration=5.08))
    text = index.summary(rows)
    assert "shortest file has 0.20 s (5 frames), the median 2.80 s (70 frames), the longest 5.08 s (127 frames)" in text
    assert re.search(r" 3 files are shorter than a clip of the reference configurations, 127 frames", text)
    assert replace(rows[0], duration=0.0).seconds == math.inf and replace(rows[0], frames=1).seconds == 0
    assert "variable" not in text and "0 of 1 files are usable" in index.summary([rows[3]])


def test_an_older_index_is_read_and_an_older_partial_one_begun_again(annotated, tmp_path):
    """Before the columns of frame intervals and notes."""
    out = tmp_path / "index.csv"
    rows = index.write_index(index.read_listed(str(annotated), None), str(out))
    with open(out, newline="") as file:
        table = [[cell for name, cell in row.items() if name not in index.NEW_COLUMNS] for row in csv.DictReader(file)]
    older = [index.OLDER_HEADER, *table]
    for name in ("older.csv", "index.csv.partial"):
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows(older)
    assert index.read_index(str(tmp_path / "older.csv"), None) == index.read_index(str(out), None)
    assert index.write_index(index.read_listed(str(annotated), None), str(out)) == rows


def test_only_files_are_opened(videos, tmp_path, monkeypatch):
    """A colon in a name is no protocol, and nothing waits at a pipe."""
    (tmp_path / "a:b.webm").symlink_to(videos / "vp9.webm")
    os.mkfifo(tmp_path / "pipe.mp4")
    monkeypatch.chdir(tmp_path)
    Path("clips.csv").write_text("a:b.webm 0\npipe.mp4 0\n")
    rows = index_csv("clips.csv", None, "index.csv")
    assert [row.error for row in rows] == ["", "is not a file (OSError)"]


def test_two_commands_do_not_write_one_index(annotated, tmp_path, monkeypatch):
    """The second is refused while the first probes, and the first ends as if alone."""
    out, probe, refused = tmp_path / "index.csv", index.probe_file, []

    def probe_while_another_starts(*arguments):
        if not refused:
            with pytest.raises(UserError, match=r"index\.csv\.partial: another `flperf index` is writing it; .* --out"):
                refused.append(None) or index_csv(annotated, None, out)
        return probe(*arguments)

    monkeypatch.setattr(index, "probe_file", probe_while_another_starts)
    assert len(index_csv(annotated, None, out, threads=1)) == len(GOOD + BROKEN) and refused
    assert len(index.read_index(str(out), None)) == len(GOOD)


def test_paths_through_links_and_parent_folders_name_the_same_file(videos, tmp_path):
    """`linked/..` is the parent of the folder that the link names, for the system as for the index, wherever it is
    written to and read from."""
    for folder, name in (("real/deep", "h264.mp4"), ("near", "vp9.webm")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder.split("/")[0] / "a").write_bytes((videos / name).read_bytes())
    (tmp_path / "near/linked").symlink_to("../real/deep")
    (tmp_path / "near/up.csv").write_text("linked/../a 0\n")  # real/a
    (tmp_path / "near/here.csv").write_text("a 0\n")
    for file, codec, frames in (("up.csv", "h264", 70), ("here.csv", "vp9", None)):
        for out in ("near/i.csv", "near/linked/i.csv", "real/i.csv", "near/linked/../j.csv", "elsewhere/i.csv"):
            (row,) = index_csv(tmp_path / "near" / file, None, tmp_path / out)
            assert row.codec == codec and row.frames in (frames, row.frames), (file, out)
            direct = os.path.realpath(tmp_path / out)  # the same index by another way
            for place in (str(tmp_path / out), direct):
                (path,) = index.read_index(place, None).paths
                wanted = tmp_path / ("real/a" if codec == "h264" else "near/a")
                assert os.path.samefile(path, wanted), (file, out, place)


def test_a_file_by_two_paths_with_two_classes_is_refused(videos, tmp_path):
    (tmp_path / "videos").symlink_to(videos)
    (tmp_path / "a.csv").write_text("videos/h264.mp4 0\n./videos/h264.mp4 1\n")
    with pytest.raises(UserError, match=r"videos/h264\.mp4: is listed twice, with class 0 and with class 1"):
        index_csv(tmp_path / "a.csv", None, tmp_path / "index.csv")


def test_mistaken_options_are_named(annotated, tmp_path):
    csv_file, good = str(annotated), str(tmp_path / "index.csv")
    text = annotated.read_text()
    for source, labels, out, threads, message in [
        (csv_file, None, csv_file, None, "--out: .* is the file of --csv"),
        (csv_file, None, str(tmp_path), None, "--out: .* is a folder"),
        (csv_file, None, f"{csv_file}/index.csv", None, "--out: .* can't be written"),
        (csv_file, None, good, -1, "--threads: must be at least 1"),
        (str(tmp_path / "nope"), None, good, None, "--csv: there is no file .*nope"),
        (csv_file, str(tmp_path / "nope"), good, None, "--labels: there is no file .*nope"),
    ]:
        with pytest.raises(UserError, match=message):
            index_csv(source, labels, out, threads)
    assert annotated.read_text() == text


def test_repeated_rows_are_kept_once_and_contradictions_refused(videos, tmp_path):
    file = tmp_path / "clips.csv"
    file.write_text(f"{videos}/vp9.webm 0\n{videos}/vp9.webm 0\n")
    assert len(index_csv(file, None, tmp_path / "index.csv")) == 1
    file.write_text(f"{videos}/vp9.webm 0\n{videos}/vp9.webm 1\n")
    with pytest.raises(UserError, match="row 2: .* has class 1 here but 0 in row 1"):
        index_csv(file, None, tmp_path / "index.csv")


def test_mistakes_name_the_row(annotated, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("0 zero\n")
    with pytest.raises(UserError, match="must name every class from 0 to 1"):
        index_csv(annotated, str(labels), str(tmp_path / "index.csv"))
    (tmp_path / "bad.csv").write_text(",".join(index.HEADER) + "\nclip.mp4,one,h264\n")
    with pytest.raises(UserError, match="row 2: is not a row of an index"):
        index.read_index(str(tmp_path / "bad.csv"), None)
    (tmp_path / "marked.csv").write_text(
        ",".join(index.HEADER) + "\nclip.mp4,3,h264,,1,1,1,1.0,1.0,0.0,0.0,,\n", encoding="utf-8-sig"
    )
    assert index.is_index(str(tmp_path / "marked.csv")) and index.read_index(
        str(tmp_path / "marked.csv"), None
    ).labels == [3]
    (tmp_path / "none.csv").write_text(
        ",".join(index.HEADER) + "\nclip.mp4,0,,,0,0,0,0.0,0.0,0.0,0.0,no video stream,\n"
    )
    with pytest.raises(UserError, match="none of its files is usable"):
        index.read_index(str(tmp_path / "none.csv"), None)


def test_a_folder_of_class_folders_needs_no_csv(videos, tmp_path):
    for path in (
        "train/b jumping/1.mp4",
        "train/a walking/2.mp4",
        "train/a walking/deeper/3.MP4",
        "val/b jumping/4.mp4",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(videos / "h264.mp4")
    (tmp_path / "train/a walking/notes.txt").write_text("no video")
    labels = str(tmp_path / "labels.csv")
    for split in ("train", "val"):
        index_folder(tmp_path / split, labels, str(tmp_path / f"{split}.csv"))
    train, val = (index.read_index(str(tmp_path / f"{split}.csv"), None) for split in ("train", "val"))
    assert [path.rpartition("/")[2] for path in train.paths] == ["2.mp4", "3.MP4", "1.mp4"] and train.labels == [
        0,
        0,
        1,
    ]
    assert val.labels == [1], "a class has the number that the labels file gave it"
    (tmp_path / "val/c running").mkdir()
    (tmp_path / "val/c running/5.mp4").symlink_to(videos / "h264.mp4")
    with pytest.raises(UserError, match="c running: .*labels.csv has no such class"):
        index_folder(tmp_path / "val", labels, str(tmp_path / "again.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--folder: .* holds no videos"):
        index_folder(tmp_path / "empty", None, str(tmp_path / "x.csv"))


def test_videos_without_classes_are_of_one(videos, tmp_path):
    rows = index_folder(videos, None, tmp_path / "index.csv")
    assert {row.label for row in rows} == {0} and {"h264.mp4", "portrait.mp4", "truncated.mp4"} <= {
        row.path.rpartition("/")[2] for row in rows
    }
    assert "unusable" in index.summary(rows)
