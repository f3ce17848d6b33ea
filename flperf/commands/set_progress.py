"""What `flperf prepare` has done so far: a line of JSON for every file, from which any number of processes resumes."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from flperf.data.probing import Row
from flperf.files import writing

GONE = -1, -1  # the state of a file that can't be found
FOLDER = "progress"  # in that of the set


@dataclass(frozen=True)
class Record:
    """What came of one original file: a row of the index, whose path is that of the prepared file."""

    source: str  # absolute path
    state: tuple[int, int]  # of the original: bytes, and time of its last change in ns; (-1, -1) if it is missing
    bytes: int  # of the prepared file; 0 if there is none
    shrunk: bool
    row: Row

    @classmethod
    def parse(cls, line: str) -> "Record | None":
        """None for a line that was not written to its end."""
        try:
            content = json.loads(line)
            return cls(**content | {"state": tuple(content["state"]), "row": Row(**content["row"])})
        except (ValueError, TypeError, KeyError):
            return None

    def is_done(self, out: Path) -> bool:
        """Whether the file was prepared in the folder `out`, or could not be read, and neither it nor its original has
        changed since. The original of a prepared file may be gone."""
        if self.row.error:
            return state_of(self.source) == self.state
        return state_of(self.source) in (self.state, GONE) and state_of(out / self.row.path)[0] == self.bytes


def state_of(path: str | Path) -> tuple[int, int]:
    """Bytes of a file and the time of its last change in ns; (-1, -1) if it can't be found."""
    try:
        status = os.stat(path)
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns


def read_records(out: Path) -> dict[str, Record]:
    """What is done in the folder `out`, by the original's path; of several records the one of the file as it is now."""
    found: dict[str, Record] = {}
    for file in sorted((out / FOLDER).glob("rank_*.jsonl")):
        for record in map(Record.parse, file.read_text(errors="replace").splitlines()):
            if record and not (record.source in found and found[record.source].is_done(out)):
                found[record.source] = record
    return found


@contextmanager
def appending(path: Path) -> Iterator[Callable[[Record], None]]:
    """A function that appends a record to a file of progress."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            if file.read(1) not in (b"", b"\n"):  # a kill cut off the last line
                file.write(b"\n")

            def append(record: Record) -> None:
                file.write(json.dumps(asdict(record)).encode() + b"\n")
                file.flush()

            yield append
