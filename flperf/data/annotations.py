"""Annotation files: the clips of a split and their classes."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flperf.errors import UserError

logger = logging.getLogger(__name__)

CLIPS_FILE = "a Kinetics CSV (rows of 'path class_index')"

LABELS_FILE = "a labels file (rows of 'index name')"

MAX_CLASSES = 1_000_000  # a larger class index is a mistake, and names for all below it would fill the memory


@dataclass(frozen=True)
class Annotations:
    """Paths and class indices of the clips of one split, in order."""

    paths: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)


def read_annotations(csv: str | None, key: str, limit: int | None) -> Annotations:
    """Read a Kinetics CSV: rows of `path class_index`, separated by the last space; paths are relative to the CSV. A
    repeated clip is kept once. Raises `UserError` that names the row."""
    folder = os.path.dirname(csv or "")
    clips: dict[str, tuple[int, int]] = {}  # path → (row, class)
    rows = 0
    for row, line in _rows(csv, key, CLIPS_FILE):
        path, _, label = line.rpartition(" ")
        path = path.rstrip()
        if not path or not label.isdecimal():
            raise UserError(f"{csv}: row {row}: expected 'path class_index', got {line[:200]!r}")
        if len(label) > 18 or int(label) >= MAX_CLASSES:
            raise UserError(
                f"{csv}: row {row}: class index {label[:40]} is above {MAX_CLASSES - 1}; number the classes from 0"
            )
        first_row, first_label = clips.setdefault(path, (row, int(label)))
        if first_label != int(label):
            raise UserError(f"{csv}: row {row}: {path} has class {label} here but {first_label} in row {first_row}")
        rows += 1
    if not clips:
        raise UserError(f"{csv}: holds no clips")
    if rows > len(clips):
        logger.warning("%s: %d rows repeat a clip and are left out", csv, rows - len(clips))
    paths, labels = [os.path.join(folder, path) for path in clips], [label for _, label in clips.values()]
    return Annotations(paths[:limit], labels[:limit])


def read_labels(csv: str | None, annotations: list[Annotations], key: str = "dataset.labels") -> list[str]:
    """Class names by index from a file with rows of `index name`; without a file, the indices. Raises `UserError` if a
    class of the annotations has no name."""
    highest = max(max(split.labels, default=0) for split in annotations)
    if csv is None:
        return [str(index) for index in range(highest + 1)]
    names = {}
    for row, line in _rows(csv, key, LABELS_FILE):
        index, _, name = line.partition(" ")
        if not index.isdecimal() or not name:
            raise UserError(f"{csv}: row {row}: expected 'index name', got {line!r}")
        names[int(index)] = name.strip()
    if highest not in names or names.keys() != set(range(len(names))):
        raise UserError(f"{csv}: must name every class from 0 to {highest} or more, names {len(names)}")
    return [names[index] for index in range(len(names))]


def existing_file(file: str | None, key: str, what: str) -> str:
    """The file that a key names. If it does not exist, raises `UserError`: "point the key to `what`"."""
    if file is None or not Path(file).is_file():
        state = "is not set" if file is None else f"there is no file {file}"
        raise UserError(f"{key}: {state}; point it to {what}")
    return file


def has_header(file: str | None, columns: list[str]) -> bool:
    """Whether a CSV exists and its first line names these columns, which identifies its format. Binary files have no
    header."""
    if file is None or not Path(file).is_file():
        return False
    with open(file, "rb") as lines:
        return lines.readline(1000).decode("utf-8-sig", errors="replace").strip() == ",".join(columns)


def _rows(file: str | None, key: str, what: str) -> Iterator[tuple[int, str]]:
    """(row, text) of the lines that are not empty; rows count from 1. A byte order mark, which Excel writes, is not
    part of the text."""
    with open(existing_file(file, key, what), encoding="utf-8-sig") as lines:
        try:
            for row, line in enumerate(lines, start=1):
                if line.strip():
                    yield row, line.strip()
        except UnicodeDecodeError:
            raise UserError(f"{file}: is not UTF-8 text; save it as UTF-8, or point {key} to {what}") from None
