"""Folders of videos: what is a video, what is left out and why."""

import os
import shutil
import socket
from collections import defaultdict

import av
import numpy as np
import pytest

from flperf.data import video_folders
from flperf.data.annotations import read_labels
from flperf.data.index import read_index, summary, write_index
from flperf.data.video_folders import find_videos, read_folder, why_no_video
from flperf.errors import UserError

KEPT = [
    *(".hidden", "0001.dat", 'a,b "c".bin', "caf\udce9", "caf\udce9.mp4", "clip.flv.part", "moving.gif"),
    *("new\nline\r", "no suffix", "notes.txt", "x "),
]


def pictures(path, codec: str, count: int, pixels: str) -> None:
    """A file of `count` noisy pictures."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 48, pixels
        for index in range(count):
            noise = np.random.default_rng(index).integers(0, 255, (48, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.fixture
def mixed(videos, tmp_path):
    """A folder of videos under odd names, and of everything else that lies beside videos."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("no suffix", "clip.flv.part", "0001.dat", "notes.txt", ".hidden", "new\nline\r", 'a,b "c".bin', "x "):
        shutil.copy(videos / "vp9.webm", folder / name)
    for name in (b"caf\xe9.mp4", b"caf\xe9"):
        shutil.copy(videos / "h264.mp4", os.path.join(os.fsencode(folder), name))
    shutil.copy(videos / "audio.mp4", folder / "sound.m4a")
    pictures(folder / "moving.gif", "gif", 3, "rgb8")
    pictures(folder / "still.gif", "gif", 1, "rgb8")
    pictures(folder / "still.png", "png", 1, "rgb24")
    pictures(folder / "still.jpg", "mjpeg", 1, "yuvj420p")
    shutil.copy(folder / "still.jpg", folder / "picture without suffix")
    (folder / "list.m3u8").write_text("#EXTM3U\n#EXTINF:2,\nno suffix\n")
    (folder / "list.ffconcat").write_text("ffconcat version 1.0\nfile 'no suffix'\n")
    (folder / "latin.txt").write_bytes("Größe\n".encode("latin-1") * 50)
    (folder / "utf16.txt").write_text("a clip\n" * 50, encoding="utf-16")
    (folder / "cut.json").write_bytes(b'{"title": "' + "é".encode() * 4000)
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1" + bytes(6000))
    (folder / "weights.bin").write_bytes(np.random.default_rng(0).bytes(100_000))
    np.save(folder / "features.npy", np.random.default_rng(0).normal(size=5000))
    (folder / "nothing").write_bytes(b"")
    (folder / "gone").symlink_to("nowhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


def test_whatever_opens_as_a_video_is_kept_and_the_rest_is_named(mixed):
    left_out = defaultdict(list)
    assert sorted(find_videos(str(mixed), 2, left_out)) == sorted(KEPT)
    assert {reason: sorted(names) for reason, names in left_out.items()} == {
        "text": ["cut.json", "list.ffconcat", "list.m3u8"],
        "a picture": ["picture without suffix", "still.gif", "still.jpg", "still.png"],
        "sound": ["sound.m4a"],
        "no video": [".DS_Store", "features.npy", "latin.txt", "utf16.txt", "weights.bin"],
        "empty": ["nothing"],
        "links to nothing": ["gone"],
        "cannot be read (Too many levels of symbolic links)": ["loop"],
        "pipes and devices": ["pipe"],
    }


def test_an_index_keeps_the_bytes_of_names(mixed, tmp_path):
    listing = read_folder(str(mixed), None)
    rows = write_index(listing, str(tmp_path / "index.csv"))
    assert [row.error for row in rows] == [""] * len(KEPT)
    paths = read_index(str(tmp_path / "index.csv"), None).paths
    assert paths == listing.clips.paths and all(os.path.isfile(path) for path in paths)
    assert {os.path.basename(os.fsencode(path)) for path in paths} == {os.fsencode(name) for name in KEPT}
    text = summary(rows, listing.left_out)
    assert "5 left out: no video: .DS_Store, features.npy, latin.txt, and 2 more" in text
    assert all("left out: " + reason in text for reason in listing.left_out) and text.isascii()


@pytest.mark.parametrize("cut", [1, 7, 13])
def test_an_interrupted_index_goes_on_within_a_name_with_a_line_break(mixed, tmp_path, cut):
    listing, out = read_folder(str(mixed), None), tmp_path / "index.csv"
    whole = write_index(listing, str(out))
    content = out.read_bytes()
    out.unlink()
    (tmp_path / "index.csv.partial").write_bytes(content[: content.index(b"new\nline") + cut])
    assert write_index(listing, str(out)) == whole and out.read_bytes() == content


def test_a_file_with_the_suffix_of_a_video_is_never_left_out(videos, tmp_path, monkeypatch):
    """Its row says what is wrong with it."""
    for name in ("empty.webm", "text.mp4", "audio.mp4"):
        shutil.copy(videos / name, tmp_path / name)
    (tmp_path / "gone.MP4").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.ts")
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.flv")
        rows = write_index(read_folder(str(tmp_path), None), str(tmp_path / "index.csv"))
    assert len(rows) == 6 and all(row.error for row in rows)


def test_nothing_is_opened_for_its_suffix_alone(mixed, monkeypatch):
    opened = []
    monkeypatch.setattr(video_folders, "why_no_video", lambda path: opened.append(os.path.basename(path)) or "")
    find_videos(str(mixed), 1, defaultdict(list))
    assert "caf\udce9" in opened and "caf\udce9.mp4" not in opened and "pipe" not in opened


def test_the_first_of_several_streams_may_be_a_picture(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("mjpeg", rate=10) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 32, 48, "yuvj420p"
        for stream, count in zip(streams, (1, 4), strict=True):
            for _ in range(count):
                container.mux(stream.encode(av.VideoFrame(32, 48, "yuvj420p")))
        for stream in streams:
            container.mux(stream.encode(None))
    assert why_no_video(str(tmp_path / "two.mkv")) == ""


def test_links_to_folders_are_followed_once(videos, tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "b", elsewhere / "deeper"):
        folder.mkdir(parents=True)
        shutil.copy(videos / "vp9.webm", folder / "1.webm")
    (root / "linked").symlink_to(elsewhere)
    (root / "a").symlink_to(root / "b")  # lies in the folder itself: b keeps its clips
    (root / "zz").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "deeper" / "up").symlink_to("..")
    left_out = defaultdict(list)
    assert find_videos(str(root), 1, left_out) == ["b/1.webm", "linked/deeper/1.webm"]
    assert sorted(left_out["links to a folder that is listed already"]) == [
        "a",
        "linked/back",
        "linked/deeper/up",
        "zz",
    ]


def test_a_folder_that_cannot_be_read_is_named(videos, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(videos / "vp9.webm", tmp_path / name / "1.webm")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    listing = read_folder(str(tmp_path), None)
    assert listing.left_out == {"folders that cannot be read (Permission denied)": ["b"]}
    assert "left out: folders that cannot be read (Permission denied): b" in summary([], listing.left_out)


def test_any_class_name_gets_the_same_number_in_another_split(videos, tmp_path):
    names = [
        "plain",
        "two words",
        "caf\udce9",
        "line\nbreak",
        " spaces ",
        "über",
        "tab\t",
        "%d",
        '"quoted"',
        "#1",
        "1",
        "\xa0",
    ]
    for split, chosen in (("train", names), ("val", names[::-2])):
        for name in chosen:
            (tmp_path / split / name).mkdir(parents=True)
            shutil.copy(videos / "vp9.webm", tmp_path / split / name / "1.webm")
    labels = str(tmp_path / "new folder" / "labels.csv")
    numbers = {}
    for split in ("train", "val"):
        clips = read_folder(str(tmp_path / split), labels).clips
        numbers[split] = dict(zip((path.split("/")[-2] for path in clips.paths), clips.labels, strict=True))
    assert sorted(numbers["train"].values()) == list(range(len(names)))
    assert numbers["val"].items() <= numbers["train"].items() and len(numbers["val"]) == 6
    assert len(read_labels(labels, [clips])) == len(names)


def test_a_folder_without_videos_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(UserError, match="--folder: .* holds no videos: 1 left out: text: notes.txt"):
        read_folder(str(tmp_path), str(tmp_path / "labels.csv"))
    assert not (tmp_path / "labels.csv").exists()
    with pytest.raises(UserError, match="there is no folder .*nope"):
        read_folder(str(tmp_path / "nope"), None)
