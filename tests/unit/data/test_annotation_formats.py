"""The official annotations of Kinetics and Something-Something v2."""

import json
import os
from pathlib import Path

import pytest

from flperf.data import video_folders
from flperf.data.annotation_formats import read_kinetics, read_ssv2
from flperf.data.annotations import read_labels
from flperf.data.index import MISSING, read_index, write_index
from flperf.data.video_folders import Listing
from flperf.errors import UserError

HEADER = "label,youtube_id,time_start,time_end,split"
CLIPS = [  # class, identifier, first second, split
    ("riding a bike", "---QUuC4vJs", 84, "train"),
    ("abseiling", "_a_1_000001", 7, "train"),
    ("zumba", "0347ZoDXyP0", 95, "validate"),
    ("abseiling", "gone_______", 123456, "train"),
]
PLACES = {"one folder": "", "class folders": "{spaced}/", "underscores": "train/{underscored}/"}


def write_csv(folder: Path, text: str) -> str:
    (folder / "kinetics.csv").write_text(text)
    return str(folder / "kinetics.csv")


def rows(header: str = HEADER, quote: str = "") -> str:
    """The CSV of CLIPS under any header."""
    lines = []
    for label, identifier, start, split in CLIPS:
        cells = {"youtube_id": identifier, "time_start": start, "time_end": start + 10, "split": split, "is_cc": 0}
        cells["label"] = f"{quote}{label}{quote}"
        lines.append(",".join(str(cells[column]) for column in header.split(",")))
    return "\n".join([header, *lines]) + "\n"


@pytest.fixture(params=PLACES)
def kinetics(request, tmp_path, videos) -> Path:
    """A folder of the clips' files but the last, with descriptions beside them and under several suffixes."""
    folder = tmp_path / "videos"
    for (label, identifier, start, _), suffix in zip(CLIPS, (".mp4", ".mkv", ".webm"), strict=False):
        place = PLACES[request.param].format(spaced=label, underscored=label.replace(" ", "_"))
        (folder / place).mkdir(parents=True, exist_ok=True)
        name = f"{identifier}_{start:06d}_{start + 10:06d}"
        (folder / place / f"{name}{suffix}").symlink_to(videos / "vp9.webm")
        (folder / place / f"{name}.json").write_text("{}")
    (folder / f"{CLIPS[3][1]}_123456_123466.txt").write_text("removed by its owner")
    (folder / "notes.mp4").write_text("no clip")
    return folder


@pytest.mark.parametrize("header", [HEADER, HEADER + ",is_cc", "split,time_end,time_start,youtube_id,label"])
@pytest.mark.parametrize("quote", ["", '"', '"""'])
def test_clips_are_found_wherever_they_lie(kinetics, tmp_path, header, quote):
    file, labels, out = write_csv(tmp_path, rows(header, quote)), str(tmp_path / "labels.csv"), tmp_path / "index.csv"
    listing = read_kinetics(file, str(kinetics), "train", labels)
    found = [os.path.splitext(os.path.basename(path))[0] for path in listing.clips.paths]
    assert found == ["---QUuC4vJs_000084_000094", "_a_1_000001_000007_000017", "gone________123456_123466"]
    assert read_labels(labels, [listing.clips]) == ["abseiling", "riding a bike", "zumba"]
    assert listing.clips.labels == [1, 0, 0] and listing.missing == {listing.clips.paths[2]}
    assert [row.error for row in write_index(listing, str(out))] == ["", "", MISSING]
    assert read_index(str(out), None).labels == [1, 0]
    validation = read_kinetics(file, str(kinetics), "val", labels)
    assert validation.clips.labels == [2] and validation.clips.paths[0].endswith(".webm") and not validation.left_out


def test_a_second_split_gets_the_numbers_of_the_first(kinetics, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("0 zumba\n1 riding_a_bike\n2 abseiling\n3 more\n")  # as --folder writes it
    assert read_kinetics(write_csv(tmp_path, rows()), str(kinetics), "train", str(labels)).clips.labels == [1, 2, 2]
    labels.write_text("0 zumba\n1 abseiling\n")
    with pytest.raises(UserError, match="class riding a bike: .*labels.csv has no such class"):
        read_kinetics(write_csv(tmp_path, rows()), str(kinetics), "train", str(labels))


def test_the_videos_are_listed_once(kinetics, tmp_path, monkeypatch):
    file, calls = write_csv(tmp_path, rows()), []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: calls.append(path) or scandir(path))
    monkeypatch.setattr(video_folders, "find_videos", None)  # would look into every file
    read_kinetics(file, str(kinetics), "train", None)
    assert len(calls) == len({*calls}) == sum(1 for _ in os.walk(kinetics))


def test_a_clip_named_or_stored_twice_is_listed_once(tmp_path, videos):
    for place in ("a", "b b", "c"):
        (tmp_path / "videos" / place).mkdir(parents=True)
        (tmp_path / "videos" / place / "x_000001_000011.mp4").symlink_to(videos / "vp9.webm")
    text = f"{HEADER}\nb_b,x,1,11,train\nb_b,x,1.0,11.0,train\nc,x,1,11,train\n"
    listing = read_kinetics(write_csv(tmp_path, text), str(tmp_path / "videos"), None, None)
    assert [path.split("/")[-2] for path in listing.clips.paths] == ["b b"], "the file in the folder of its class"
    assert listing.left_out == {
        "rows that repeat a clip": ["row 3"],
        "rows that give a clip a second class": ["row 4"],
        "further files of a clip": ["a/x_000001_000011.mp4", "c/x_000001_000011.mp4"],
    }


def test_clips_without_labels_are_of_one_class(kinetics, tmp_path):
    file = write_csv(tmp_path, rows("youtube_id,time_start,time_end,split"))
    assert read_kinetics(file, str(kinetics), "train", None).clips.labels == [0, 0, 0]
    (tmp_path / "labels.csv").write_text("0 abseiling\n")
    with pytest.raises(UserError, match="kinetics.csv: has clips without a class, .* leave --labels out"):
        read_kinetics(file, str(kinetics), "train", str(tmp_path / "labels.csv"))
    mixed = rows().replace("abseiling", "")
    assert read_kinetics(write_csv(tmp_path, mixed), str(kinetics), "train", None).clips.labels == [0, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4 0\nb.mp4 1\n", "row 1: is not the header of .* no column youtube_id, .* are for --csv"),
        (f"{HEADER}\na,b,1,2,train\n".replace(",", "\t"), "no column youtube_id, .*; separate the columns by commas"),
        (f"{HEADER}\na,b,1,2,train\n".replace(",", ";"), "no column youtube_id, .*; separate the columns by commas"),
        (f'{HEADER}\na,b,1,2,"train\na,c,1,2,train\n', "row 2: goes on in the next line; close its quotes"),
        (HEADER + "\n", "holds no clips"),
        (f"{HEADER}\na,b,1,2\n", "row 2: has 4 columns, the header has 5"),
        (f"{HEADER}\na,b,1,2,train\na,b,one,2,train\n", "row 3: expected an identifier and two numbers of seconds"),
        (f"{HEADER}\na,,1,2,train\n", "row 2: expected an identifier"),
        (f"{HEADER}\na,../b,1,2,train\n", "row 2: expected an identifier"),
        (f"{HEADER}\na,b,-1,2,train\n", "row 2: expected an identifier"),
        (f"{HEADER}\na,b,1,2,train\na,c,1,2,test\n", "several splits: train .1 clips., test .1 clips.; .* --split"),
        (f"{HEADER}\na,b,1,2,train\n", "--videos: .* holds none of the 1 clips .*, such as b_000001_000002.mp4"),
    ],
)
def test_mistakes_in_a_csv_are_named(text, message, tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match=message):
        read_kinetics(write_csv(tmp_path, text), str(tmp_path / "videos"), None, None)


def test_an_unknown_split_and_a_missing_folder_are_named(kinetics, tmp_path):
    file = write_csv(tmp_path, rows())
    with pytest.raises(
        UserError, match=r"--split: .* no clips of the split 'test'; it has train \(3 clips\), validate"
    ):
        read_kinetics(file, str(kinetics), "test", None)
    with pytest.raises(UserError, match="--videos: there is no folder .*nope"):
        read_kinetics(file, str(tmp_path / "nope"), "train", None)


CLASSES = {
    "Holding something": "1",
    "Moving something and something closer": "0",
    "Showing that something is empty": "2",
}
TEMPLATES = ["Holding [something]", "Moving [something] and [something] closer", "Holding [something]"]


@pytest.fixture(params=["", "something-something-v2-"])
def ssv2(request, tmp_path, videos) -> Path:
    """Annotations of three clips, the second of which has no file."""
    entries = [
        {"id": str(90 + number), "label": "holding a cup", "template": template, "placeholders": ["a cup"]}
        for number, template in enumerate(TEMPLATES)
    ]
    (tmp_path / "labels").mkdir()
    contents = {"labels": CLASSES, "train": entries, "validation": entries[:1], "test": [{"id": 92}]}
    for name, content in contents.items():
        (tmp_path / "labels" / f"{request.param}{name}.json").write_text(json.dumps(content))
    (tmp_path / "videos/part_1").mkdir(parents=True)
    (tmp_path / "videos/90.webm").symlink_to(videos / "vp9.webm")
    (tmp_path / "videos/part_1/92.mp4").symlink_to(videos / "h264.mp4")
    return tmp_path


def read(ssv2: Path, split: str | None, labels: str | None = None) -> Listing:
    return read_ssv2(str(ssv2 / "labels"), str(ssv2 / "videos"), split, labels)


def test_classes_have_the_numbers_of_labels_json(ssv2):
    labels = str(ssv2 / "labels.csv")
    listing = read(ssv2, "train", labels)
    assert [path.removeprefix(f"{ssv2}/videos/") for path in listing.clips.paths] == [
        "90.webm",
        "91.webm",
        "part_1/92.mp4",
    ]
    assert listing.clips.labels == [1, 0, 1] and listing.missing == {f"{ssv2}/videos/91.webm"}
    assert read_labels(labels, []) == sorted(CLASSES, key=lambda name: int(CLASSES[name]))
    assert [row.error for row in write_index(listing, str(ssv2 / "index.csv"))] == ["", MISSING, ""]
    assert read(ssv2, "val", labels).clips.labels == read(ssv2, "validation").clips.labels == [1]
    assert read(ssv2, "test").clips.labels == [0]
    with pytest.raises(UserError, match="test.json: has clips without a class, .*labels.csv"):
        read(ssv2, "test", labels)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "train",
            [{"id": "90", "template": "Eating [something]"}],
            r"entry 1 \(id 90\): labels.json has no class 'Eat",
        ),
        ("train", [{"id": "90", "template": TEMPLATES[0]}, {"template": "x"}], "entry 2: has no id"),
        ("train", [{"id": "../90", "template": TEMPLATES[0]}], "entry 1: has no id"),
        ("train", ["90"], "entry 1: has no id"),
        ("train", {"id": "90"}, "train.json: holds no list of clips"),
        ("train", [], "train.json: holds no list of clips"),
        ("labels", ["a"], "labels.json: must map each class to its number"),
        ("labels", {"a": "1", "b": "2"}, "must number the classes from 0 to 1"),
        ("labels", {"a": "0", "b": 0}, "'b' and 'a' both have the number 0"),
        ("labels", {"a": "900000000"}, "'a': class index 900000000 is above"),
        ("labels", {}, "must number the classes from 0"),
    ],
)
def test_mistakes_in_json_are_named(ssv2, name, content, message):
    (file,) = (ssv2 / "labels").glob(f"*{name}.json")
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read(ssv2, "train")


def test_other_mistakes_are_named(ssv2):
    with pytest.raises(UserError, match="--split: is not set; choose one of train, validation, test"):
        read(ssv2, None)
    with pytest.raises(UserError, match="--ssv2: there is no file .*labels/tset.json"):
        read(ssv2, "tset")
    with pytest.raises(UserError, match="--ssv2: .*nope is not a folder"):
        read_ssv2(str(ssv2 / "nope"), str(ssv2), "train", None)
    (file,) = (ssv2 / "labels").glob("*train.json")
    for text in ("[{", "[" * 100_000, '{"a": NaN'):
        file.write_text(text)
        with pytest.raises(UserError, match="train.json: is not valid JSON: "):
            read(ssv2, "train")
