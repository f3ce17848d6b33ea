"""Finds the videos in a folder, whatever their names are: what opens as a video is one. What is left out is listed with
the reason.

A file with a usual suffix of videos is listed without being opened, so that its row in an index says what is wrong with
it. Any other file is looked into: its first bytes show text, and a demuxer gets little more to find a format in, which
keeps it quick for files that are no videos.
"""

import codecs
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from heapq import heappop, heappush

import av
from av.stream import Disposition
from tqdm import tqdm

from flperf.data.annotations import UNLABELLED, Annotations, class_name, number_classes
from flperf.data.containers import DECODE_ERRORS, demux
from flperf.errors import UserError

# fmt: off
VIDEO_SUFFIXES = {
    ".3g2", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
}
# fmt: on
HEAD_BYTES = 4096
FORMAT_BYTES = 2**16  # in which a demuxer must find the format; in a megabyte, its default, it takes 50 ms to find none
CONTROL_CHARACTERS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))  # that text does not hold
# Demuxers that make video of what is none: pictures, numbered pictures, raw bytes, text as a terminal shows it.
NOT_VIDEO_FORMATS = {"image2", "rawvideo", "tty", "bin", "xbin", "adf", "idf"}
LISTED = 3  # files named for a reason

LeftOut = dict[str, list[str]]  # reason → files, folders or rows


@dataclass(frozen=True)
class Listing:
    """What an index is made of."""

    clips: Annotations
    missing: frozenset[str] = frozenset()  # paths of clips that are not there
    left_out: LeftOut = field(default_factory=dict)


def read_folder(folder: str, labels: str | None, threads: int | None = None) -> Listing:
    """The videos of a folder with one folder for each class; videos directly in it are of the class "unlabelled".

    The file `labels` numbers the classes. If it does not exist, it is written, with the classes in the order of their
    names; a second split that is read with it gets the same numbers. Raises `UserError` for a folder without videos and
    for a class that the file does not name.
    """
    left_out: LeftOut = defaultdict(list)
    check_folder(folder, "--folder")
    files = find_videos(folder, threads, left_out)
    if not files:
        listing = "; ".join(line.strip() for line in describe_left_out(left_out)) or "it is empty"
        raise UserError(f"--folder: {folder} holds no videos: {listing}")
    classes = [class_name(file.split(os.sep)[0]) if os.sep in file else UNLABELLED for file in files]
    numbers = number_classes(sorted(set(classes)), set(classes), labels)
    paths = [os.path.join(absolute(folder), file) for file in files]
    return Listing(Annotations(paths, [numbers[name] for name in classes]), left_out=left_out)


def check_folder(folder: str, option: str) -> None:
    """Raise `UserError` if an option does not name a folder."""
    if not os.path.isdir(folder):
        state = f"{folder} is not a folder" if os.path.lexists(folder) else f"there is no folder {folder}"
        raise UserError(f"{option}: {state}; point it to a folder of videos")


def absolute(path: str) -> str:
    """An absolute path without `..`, which leads elsewhere behind a link than its name says."""
    parts = path.split(os.sep)
    ups = len(parts) - parts[::-1].index(os.pardir) if os.pardir in parts else 0
    return os.path.abspath(os.path.join(os.path.realpath(os.sep.join(parts[:ups])), *parts[ups:]) if ups else path)


def find_videos(folder: str, threads: int | None, left_out: LeftOut) -> list[str]:
    """The videos of a folder and the folders below it, relative to it, in the order of their names."""
    files = list_files(folder, left_out)
    doubtful = [file for file in files if not has_video_suffix(file)]
    with ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        found = pool.map(lambda file: why_no_video(os.path.join(folder, file)), doubtful)
        reasons = list(tqdm(found, total=len(doubtful), desc="looking for videos", unit="file", disable=None))
    others = {file: reason for file, reason in zip(doubtful, reasons, strict=True) if reason}
    for file, reason in others.items():
        left_out[reason].append(file)
    return [file for file in files if file not in others]


def list_files(folder: str, left_out: LeftOut) -> list[str]:
    """The files of a folder and the folders below it, relative to it, in the order of their names.

    Links are followed. A folder that several paths lead to is listed once: where it lies, or under the first link.
    """
    files, seen = [], set()
    folders, links = [""], []
    while folders or links:
        relative = folders.pop() if folders else heappop(links)
        path = os.path.join(folder, relative)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                left_out["links to a folder that is listed already"].append(relative)
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            left_out[f"folders that cannot be read ({error.strerror})"].append(relative or folder)
            continue
        for entry in entries:
            name = os.path.join(relative, entry.name)
            kind = _kind(entry)
            if kind == "folder":
                if entry.is_symlink():
                    heappush(links, name)
                else:
                    folders.append(name)
            elif kind == "file" or has_video_suffix(name):
                files.append(name)
            else:
                left_out[kind].append(name)
    return sorted(files, key=lambda file: file.split(os.sep))


def has_video_suffix(file: str) -> bool:
    """Whether a name is that of a video that anyone would expect to be listed."""
    return os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES


def why_no_video(path: str) -> str:
    """Why a regular file is no video; empty if it is one: it has a stream of more than one picture."""
    try:
        with open(path, "rb") as content:
            head = content.read(HEAD_BYTES)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not head:
        return "empty"
    if _is_text(head):  # demuxers would take some text for a list of files to open, or of addresses
        return "text"
    try:
        options = {"formatprobesize": str(FORMAT_BYTES)}
        with av.open(absolute(path), metadata_errors="ignore", options=options) as container:
            return _why_not_moving(container)
    except DECODE_ERRORS:
        return "no video"


def describe_left_out(left_out: LeftOut) -> Iterator[str]:
    """A line for each reason, the most frequent first, with examples."""
    for reason, names in sorted(left_out.items(), key=lambda item: -len(item[1])):
        more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
        yield f"{len(names):8} left out: {reason}: {', '.join(names[:LISTED])}{more}"


def _why_not_moving(container: av.container.InputContainer) -> str:
    """Why an opened file is no video; empty if it is one."""
    name = container.format.name
    if name in NOT_VIDEO_FORMATS or name.endswith("_pipe"):
        return "a picture" if name == "image2" or name.endswith("_pipe") else "no video"
    streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & Disposition.attached_pic and stream.codec_context and stream.codec_context.width
    ]
    if not streams:
        return "sound" if container.streams.audio else "no video"
    pictures: Counter[int] = Counter()
    for packet in demux(container, streams):
        pictures[packet.stream.index] += 1
        if pictures[packet.stream.index] > 1:
            return ""
    return "a picture"


def _is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8 text; a character may be cut off at their end."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return head.translate(None, CONTROL_CHARACTERS) == head


def _kind(entry: os.DirEntry[str]) -> str:
    """ "folder", "file", or why it is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "links to nothing" if entry.is_symlink() and not os.path.exists(entry.path) else "pipes and devices"
    except OSError as error:  # a link to itself
        return f"cannot be read ({error.strerror})"
