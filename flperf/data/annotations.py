"""Annotation files: the clips of a split and their classes."""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from flperf.data.text_files import is_utf8, not_text, text_rows
from flperf.errors import UserError, printable
from flperf.files import write_atomically, writing

logger = logging.getLogger(__name__)

CLIPS_FILE = "a Kinetics CSV (rows of 'path class_index')"

LABELS_FILE = "a labels file (rows of 'index name')"

FROM_ZERO = "number the classes from 0"
MAX_CLASSES = 1_000_000  # a larger class index is a mistake, and names for all below it would fill the memory

UNLABELLED = "unlabelled"  # the class of clips without one

# A path that looks as if the row was not written as 'path class_index' in UTF-8: with a quote or a separator at its
# end, or a second class index. It is taken if such a file exists.
DOUBTFUL_PATH = re.compile(r"""^["']|["',;]$|\.\w{2,5} +-?[\d.]+$|[\t\udc80-\udcff]""")

# How a row looks that isn't 'path class_index', and what to do.
MISTAKES = {
    r"(.*,)?youtube_id,.*|.+,[\w-]{11},\d+,\d+,\w*(,.*)?": "this is Kinetics' own CSV; index it with "
    "`flperf index --kinetics {csv} --videos DIR`",
    r"[\[{]\s*([\[{\"].*)?": "this is JSON; index Something-Something's with `flperf index --ssv2 LABELS_DIR "
    "--videos DIR`",
    r"path,label,codec,.*": "this is an index, of this version of flperf or another; write "
    "it again with `flperf index`, from what it was made of",
    r"path,label,shard,row|(.*,)?out_path(,.*)?": "this is a manifest of cached latents, for "
    "dataset.kind=kinetics_400_cached",
    r"[A-Za-z_]+[\s,;]+[A-Za-z_]+([\s,;]+[A-Za-z_]+)*": "if this is a header, remove it",
    r"[^\t]*\t.*": "columns are separated by a space, not by a tab",
    r"[^,]*[,;]\s*[\"']?-?[\d.]+.*|\S*[,;]\S*": "columns are separated by a space, not by a comma",
    r"[\"'].*|.* [\"']\S*[\"']": "write paths and classes without quotes",
    r".+ -?\d+ \S+": "there are only two columns; remove the third",
}


@dataclass(frozen=True)
class SourceClips:
    """One of several sources of a split."""

    file: str
    size: int  # number of its clips
    weight: float  # its share of the samples is proportional to it


@dataclass(frozen=True)
class Annotations:
    """Paths and class indices of the clips of one split, in order."""

    paths: list[str]
    labels: list[int]
    sources: tuple[SourceClips, ...] = ()  # their clips follow one another; () if the split is one file
    # of each file: number of frames, and seconds from the first to the last; None unless an index has them
    lengths: list[tuple[int, float]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def chosen(self, rows: Sequence[int]) -> "Annotations":
        """Only these clips of one file."""
        lengths = self.lengths and [self.lengths[row] for row in rows]
        return Annotations([self.paths[row] for row in rows], [self.labels[row] for row in rows], lengths=lengths)


def read_annotations(csv: str | None, key: str, limit: int | None) -> Annotations:
    """Read a Kinetics CSV: rows of `path class_index`, separated by the last space; paths are relative to the CSV. A
    repeated clip is kept once. Raises `UserError` that names the row."""
    folder = os.path.dirname(csv or "")
    clips: dict[str, tuple[int, int]] = {}  # path → (row, class)
    rows = 0
    for row, line in text_rows(csv, key, CLIPS_FILE):
        path, label = _path_and_class(csv, row, line)
        if path != path.strip() and not os.path.exists(os.path.join(folder, path)):
            path = path.strip()  # no name with spaces at its ends, but a careless row
        if DOUBTFUL_PATH.search(path) and not os.path.exists(os.path.join(folder, path)):
            if not is_utf8(path):
                raise not_text(f"{csv}: row {row}", key, CLIPS_FILE)
            raise UserError(f"{csv}: row {row}: there is no file {path!r}{_advice(f'{csv}: row {row}', line)}")
        first_row, first_label = clips.setdefault(path, (row, label))
        if first_label != label:
            raise UserError(f"{csv}: row {row}: {path} has class {label} here but {first_label} in row {first_row}")
        rows += 1
    if not clips:
        raise UserError(f"{csv}: holds no clips")
    if rows > len(clips):
        logger.warning("%s: %d rows repeat a clip and are left out", csv, rows - len(clips))
    paths, labels = [os.path.join(folder, path) for path in clips], [label for _, label in clips.values()]
    return Annotations(paths[:limit], labels[:limit])


def class_index(text: str) -> int:
    """The class index that a cell holds. Raises `ValueError` with the reason if it is none."""
    if not text.isdecimal():
        negative = re.fullmatch(r"-\d+", text)
        raise ValueError(f"class index {text[:40]!r} is {'negative' if negative else 'no whole number'}; {FROM_ZERO}")
    if len(text) > len(str(MAX_CLASSES)) + 10 or int(text) >= MAX_CLASSES:  # int() refuses thousands of digits
        raise ValueError(f"class index {text[:40]} is above {MAX_CLASSES - 1}; {FROM_ZERO}")
    return int(text)


def read_labels(csv: str | None, annotations: list[Annotations], key: str = "dataset.labels") -> list[str]:
    """Class names by index from a file with rows of `index name`; without a file, the indices. Raises `UserError` if a
    class of the annotations has no name."""
    lowest = min((min(split.labels) for split in annotations if len(split)), default=0)
    highest = max((max(split.labels) for split in annotations if len(split)), default=0)
    if csv is None:
        if lowest == 1:
            logger.warning("class 0 is missing: the classes of the clips begin at 1; %s", FROM_ZERO)
        return [str(index) for index in range(highest + 1)]
    names: dict[int, str] = {}
    for row, line in text_rows(csv, key, LABELS_FILE):
        index, name = _index_and_name(f"{csv}: row {row}", line, key)
        if names.setdefault(index, name) != name:
            raise UserError(f"{csv}: row {row}: class {index} is {name!r} here but {names[index]!r} above")
    if not names:
        raise UserError(f"{csv}: holds no classes; point {key} to {LABELS_FILE}")
    size = max(highest + 1, len(names))
    if len(names) < size or max(names) >= size:
        first = next(index for index in range(size) if index not in names)
        begins = f"; the classes of the clips begin at 1: {FROM_ZERO}" if first == highest and lowest == 1 else ""
        raise UserError(
            f"{csv}: must name every class from 0 to {highest} or more, names {len(names)}; class {first} is "
            f"missing{begins}"
        )
    return [names[index] for index in range(len(names))]


def class_name(text: str) -> str:
    """A class name as a labels file holds it: one line of UTF-8, in which other bytes, control characters and spaces at
    either end are escapes."""
    name = printable(text)
    inner = name.strip(" ")
    before = len(name) - len(name.lstrip(" ")) if inner else 0
    return "\\x20" * before + inner + "\\x20" * (len(name) - before - len(inner))


def spaced(name: str) -> str:
    """A class name with spaces for underscores."""
    return name.replace("_", " ")


def number_classes(names: list[str], used: Collection[str], labels: str | None) -> dict[str, int]:
    """Index of each class in `used`: its index in `names`, or in the file `labels`.

    If the file does not exist, it is written, with `names`; a second split that is read with it gets the same numbers.
    There a name may have underscores for spaces, as folders have. Raises `UserError` for a class that the file does not
    name, or names twice.
    """
    if labels and not os.path.lexists(labels):
        _write_labels(Path(labels), names)
    elif labels:
        names = read_labels(labels, [], "--labels")
    exact, similar = defaultdict(list), defaultdict(list)
    for index, name in enumerate(names):
        exact[name].append(index)
        similar[spaced(name)].append(index)
    numbers = {}
    for name in sorted(used):
        found = exact.get(name) or similar.get(spaced(name)) or []
        if len(found) != 1:
            problem = "gives this name to several classes" if found else "has no such class; add it there"
            raise UserError(f"class {name}: {labels} {problem}, or name another file with --labels")
        numbers[name] = found[0]
    return numbers


def _write_labels(file: Path, names: list[str]) -> None:
    with writing(file):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(f"{index} {name}\n" for index, name in enumerate(names)))


def _path_and_class(csv: str | None, row: int, line: str) -> tuple[str, int]:
    """The columns of a row of a Kinetics CSV. Raises `UserError` that names it."""
    path, _, label = line.rstrip().rpartition(" ")
    try:
        if not path.strip():
            raise ValueError
        return path, class_index(label)
    except ValueError as error:
        plain = path and not DOUBTFUL_PATH.search(path) and re.fullmatch(r"-?\d+(\.\d*)?", label)
        advice = error if plain else f"expected 'path class_index', got {line.strip()[:200]!r}{_advice(csv, line)}"
        raise UserError(f"{csv}: row {row}: {advice}") from None


def _index_and_name(where: str, line: str, key: str) -> tuple[int, str]:
    """The columns of a row of a labels file. Raises `UserError` that begins with `where`."""
    if not is_utf8(line):
        raise not_text(where, key, LABELS_FILE)
    index, _, name = line.strip(" \t").partition(" ")
    try:
        if not name:
            raise ValueError("there is no name")
        return class_index(index), name.lstrip(" ")
    except ValueError as error:
        separated = re.match(r"-?\d+[,;\t]", line)
        advice = "columns are separated by a space" if separated else error
        raise UserError(f"{where}: expected 'index name', got {line[:200]!r}: {advice}") from None


def _advice(csv: str | None, line: str) -> str:
    """What to do about a row that isn't 'path class_index'; empty if nothing is known."""
    for pattern, advice in MISTAKES.items():
        if re.fullmatch(pattern, line.strip()):
            return ": " + advice.replace("{csv}", str(csv))
    return ""
