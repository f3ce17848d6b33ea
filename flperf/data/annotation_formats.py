"""Official annotations of two datasets: Kinetics' CSV with a header, and Something-Something v2's JSON.

Both name clips, not files. The folder of the videos is listed once, and the file of a clip is found by its name, in any
folder below and with any suffix. A clip without a file is listed as missing.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from flperf.data.annotations import UNLABELLED, Annotations, class_index, class_name, number_classes, spaced
from flperf.data.text_files import csv_rows, is_utf8, not_text, read_json
from flperf.data.video_folders import (
    LeftOut,
    Listing,
    absolute,
    check_folder,
    has_video_suffix,
    list_files,
    why_no_video,
)
from flperf.errors import UserError

KINETICS_FILE = "Kinetics' CSV with the header label,youtube_id,time_start,time_end,split"
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
KINETICS_STEM = re.compile(r"(.+)_(\d+)_(\d+)")  # of a file's name: identifier, first and last second
SSV2_FILE = "a file of Something-Something v2's annotations"
SSV2_SPLITS = ("train", "validation", "test")
SSV2_PREFIXES = ("", "something-something-v2-")  # the second in older releases
VALIDATION = {"val", "validate", "validation"}  # names of one split


@dataclass(frozen=True)
class NamedClip:
    """A clip as annotations name it."""

    where: str  # the row or entry
    key: Hashable  # what identifies its file by its stem
    file: str  # the usual name of its file
    label: str  # its class; "" if it has none


def read_kinetics(file: str, videos: str, split: str | None, labels: str | None) -> Listing:
    """The clips of Kinetics' CSV; classes are numbered in the order of their names in the whole CSV, or by the file
    `labels`. A CSV of several splits needs `split`. Raises `UserError` that names the row or the option."""
    rows = _kinetics_rows(file)
    splits = Counter(row.get("split", "") for _, row in rows)
    named = ", ".join(f"{name or 'no name'} ({count} clips)" for name, count in splits.items())
    if split is None and len({_canonical(name) for name in splits}) > 1:
        raise UserError(f"{file}: holds several splits: {named}; choose one with --split")
    chosen = [(number, row) for number, row in rows if split in (None, row.get("split"))] or [
        (number, row) for number, row in rows if _canonical(split) == _canonical(row.get("split", ""))
    ]
    if not chosen:
        raise UserError(f"--split: {file} has no clips of the split {split!r}; it has {named}")
    clips = [_kinetics_clip(file, number, row) for number, row in chosen]
    names = sorted({_kinetics_class(row) for _, row in rows} - {""})
    return _find_clips(file, clips, videos, _kinetics_key, names, labels)


def read_ssv2(folder: str, videos: str, split: str | None, labels: str | None) -> Listing:
    """The clips of a split of Something-Something v2; classes have the numbers of its labels.json, or of the file
    `labels`. Raises `UserError` that names the entry or the option."""
    if split is None:
        raise UserError(f"--split: is not set; choose one of {', '.join(SSV2_SPLITS)}")
    if not os.path.isdir(folder):
        raise UserError(f"--ssv2: {folder} is not a folder; point it to the folder of labels.json and train.json")
    names = _ssv2_classes(folder)
    file = _ssv2_file(folder, _canonical(split))
    entries = read_json(file, "--ssv2", SSV2_FILE)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: holds no list of clips")
    clips = [_ssv2_clip(file, number, entry, set(names)) for number, entry in enumerate(entries, start=1)]
    return _find_clips(file, clips, videos, lambda stem: stem, names, labels)


def _find_clips(
    file: str,
    clips: list[NamedClip],
    videos: str,
    key_of: Callable[[str], Hashable],
    names: list[str],
    labels: str | None,
) -> Listing:
    """The files of the clips, in their order. `key_of` gives the key that the stem of a file's name stands for."""
    check_folder(videos, "--videos")
    left_out: LeftOut = defaultdict(list)
    unique: dict[Hashable, NamedClip] = {}
    for clip in clips:
        if unique.setdefault(clip.key, clip).label != clip.label:
            left_out["rows that give a clip a second class"].append(clip.where)
        elif unique[clip.key] is not clip:
            left_out["rows that repeat a clip"].append(clip.where)
    found = _files_by_key(videos, key_of, unique.keys(), left_out)
    chosen = {key: _choose(found[key], clip.label, videos, left_out) for key, clip in unique.items() if key in found}
    if not any(chosen.values()):
        raise UserError(
            f"--videos: {videos} holds none of the {len(unique)} clips of {file}, such as {clips[0].file[:100]}; point "
            "it to their folder"
        )
    used = {clip.label or UNLABELLED for clip in unique.values()}
    if labels and os.path.lexists(labels) and UNLABELLED in used - set(names):
        raise UserError(f"{file}: has clips without a class, which {labels} can't number; leave --labels out")
    numbers = number_classes(_class_list(names, used), used, labels)
    root = absolute(videos)
    paths = {os.path.join(root, chosen.get(key) or clip.file): clip for key, clip in unique.items()}
    missing = frozenset(os.path.join(root, clip.file) for key, clip in unique.items() if not chosen.get(key))
    annotations = Annotations(list(paths), [numbers[clip.label or UNLABELLED] for clip in paths.values()])
    return Listing(annotations, missing, left_out)


def _class_list(names: list[str], used: set[str]) -> list[str]:
    """The classes by index. That of clips without one comes last, or alone if no clip has another."""
    if used == {UNLABELLED}:
        return [UNLABELLED]
    return [*names, *({UNLABELLED} & used - set(names))]


def _files_by_key(
    videos: str, key_of: Callable[[str], Hashable], wanted: Any, left_out: LeftOut
) -> dict[Hashable, list[str]]:
    """The files of a folder whose stem stands for a wanted key."""
    found = defaultdict(list)
    for file in list_files(videos, left_out):
        key = key_of(os.path.splitext(os.path.basename(file))[0])
        if key in wanted:
            found[key].append(file)
    return found


def _choose(files: list[str], label: str, videos: str, left_out: LeftOut) -> str | None:
    """The video among the files of one clip: the one in the folder of its class, else the first by name."""
    candidates = [file for file in files if has_video_suffix(file)] or [
        file for file in files if not why_no_video(os.path.join(videos, file))
    ]
    candidates.sort(key=lambda file: spaced(os.path.basename(os.path.dirname(file))) != spaced(label))
    if len(candidates) > 1:
        left_out["further files of a clip"] += candidates[1:]
    return candidates[0] if candidates else None


def _kinetics_rows(file: str) -> list[tuple[int, dict[str, str]]]:
    """(row, cells by column) of the CSV. Raises `UserError` that names the row."""
    rows = csv_rows(file, "--kinetics", KINETICS_FILE)
    _, header = next(rows, (1, []))
    columns = [column.strip().lower() for column in header]
    lacking = [column for column in KINETICS_COLUMNS if column not in columns]
    if lacking:
        separated = re.search(r"youtube_id\s*[;\t]|[;\t]\s*youtube_id", columns[0]) if columns else None
        advice = "separate the columns by commas" if separated else "rows of 'path class_index' are for --csv"
        raise UserError(
            f"{file}: row 1: is not the header of {KINETICS_FILE}: there is no column {', '.join(lacking)}; {advice}"
        )
    named = []
    for number, cells in rows:
        if not all(map(is_utf8, cells)):
            raise not_text(f"{file}: row {number}", "--kinetics", KINETICS_FILE)
        if len(cells) != len(columns):
            raise UserError(f"{file}: row {number}: has {len(cells)} columns, the header has {len(columns)}")
        if any("\n" in cell for cell in cells):
            raise UserError(f"{file}: row {number}: goes on in the next line; close its quotes")
        named.append((number, dict(zip(columns, (cell.strip() for cell in cells), strict=True))))
    if not named:
        raise UserError(f"{file}: holds no clips")
    return named


def _kinetics_clip(file: str, number: int, row: dict[str, str]) -> NamedClip:
    identifier, *times = (row[column] for column in KINETICS_COLUMNS)
    try:
        start, end = (_seconds(time) for time in times)
        if not identifier or "/" in identifier:
            raise ValueError
    except ValueError:
        raise UserError(
            f"{file}: row {number}: expected an identifier and two numbers of seconds under "
            f"{', '.join(KINETICS_COLUMNS)}, got {', '.join([identifier, *times])!r}"
        ) from None
    name = f"{identifier}_{start:06d}_{end:06d}.mp4"
    return NamedClip(f"row {number}", (identifier, start, end), name, _kinetics_class(row))


def _seconds(text: str) -> int:
    """Whole seconds, written as `10` or `10.0`."""
    if not re.fullmatch(r"\d{1,9}(\.0*)?", text):
        raise ValueError
    return int(text.split(".")[0])


def _kinetics_class(row: dict[str, str]) -> str:
    """A label without quotes that were written twice."""
    return class_name(row.get("label", "").strip(' "'))


def _kinetics_key(stem: str) -> Hashable:
    found = KINETICS_STEM.fullmatch(stem)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _canonical(split: str | None) -> str | None:
    return "validation" if split in VALIDATION else split


def _ssv2_file(folder: str, name: str | None) -> str:
    """A file of annotations under its newer or its older name."""
    files = [os.path.join(folder, f"{prefix}{name}.json") for prefix in SSV2_PREFIXES]
    return next((file for file in files if os.path.isfile(file)), files[0])


def _ssv2_classes(folder: str) -> list[str]:
    """Class names by index, from labels.json."""
    file = _ssv2_file(folder, "labels")
    numbers = read_json(file, "--ssv2", SSV2_FILE)
    if not isinstance(numbers, dict):
        raise UserError(f"{file}: must map each class to its number")
    names = {}
    for name, number in numbers.items():
        try:
            index = class_index(str(number))
        except ValueError as error:
            raise UserError(f"{file}: {name!r}: {error}") from None
        if names.setdefault(index, name) != name:
            raise UserError(f"{file}: {name!r} and {names[index]!r} both have the number {index}")
    if not names or max(names) >= len(names):
        raise UserError(f"{file}: must number the classes from 0 to {max(len(names) - 1, 0)}, without a gap")
    return [class_name(names[index]) for index in range(len(names))]


def _ssv2_clip(file: str, number: int, entry: Any, names: set[str]) -> NamedClip:
    """A clip; its class is its template without the brackets. Clips of the test split have none."""
    identifier = entry.get("id") if isinstance(entry, dict) else None
    if not re.fullmatch(r"[\w-]+", str(identifier if identifier is not None else "")):
        raise UserError(f"{file}: entry {number}: has no id")
    label = class_name(re.sub(r"[\[\]]", "", str(entry.get("template") or "")))
    if label and label not in names:
        raise UserError(f"{file}: entry {number} (id {identifier}): labels.json has no class {label!r}")
    return NamedClip(f"entry {number}", str(identifier), f"{identifier}.webm", label)
