"""An index of a dataset's files: one CSV with the properties of each file. Training takes it instead of the dataset's
CSV.

Rows are written one by one to a file beside it, so that an interrupted run continues with those. The index itself is
written when all are there.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from flperf.data.annotations import Annotations, class_index, read_annotations, read_labels
from flperf.data.probing import Row, probe_file
from flperf.data.samplers import FrameSampling
from flperf.data.text_files import csv_rows, has_header
from flperf.data.video_folders import LeftOut, Listing, absolute, describe_left_out
from flperf.errors import UserError, printable
from flperf.files import atomic_file, locked, writing

INDEX_FILE = "an index that `flperf index` wrote"
MISSING = "missing"  # the error of a clip that annotations name and that has no file
REFERENCE_WINDOW = FrameSampling(64, 2, "random")  # configs/references
MANY_RESOLUTIONS = 64  # NVDEC keeps a decoder for each size; above this number the summary advises `flperf prepare`

HEADER = [field.name for field in fields(Row)]
NEW_COLUMNS = ("shortest_interval", "longest_interval", "notes")  # older indices don't have them
OLDER_HEADER = [name for name in HEADER if name not in NEW_COLUMNS]
# How an index is written: bytes of a path that are not UTF-8 are written as they are.
TEXT: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}


def is_index(file: str | None) -> bool:
    """Whether a CSV is an index, by its first line."""
    return has_header(file, HEADER) or has_header(file, OLDER_HEADER)


def read_index(file: str, limit: int | None, key: str = "dataset.train") -> Annotations:
    """The usable files of an index, the first `limit` of them; paths are relative to the index."""
    listed = list(_rows(file, key))
    if not listed:
        raise UserError(f"{file}: holds no clips")
    rows = [row for row in listed if not row.error][:limit]
    if not rows:
        raise UserError(f"{file}: none of its files is usable; its column 'error' gives the reasons")
    folder = os.path.dirname(file)
    return Annotations(
        [os.path.join(folder, row.path) for row in rows],
        [row.label for row in rows],
        lengths=[(row.frames, row.seconds) for row in rows],
    )


def read_listed(file: str, labels: str | None) -> Listing:
    """The files of a Kinetics CSV. Raises `UserError` that names the row, and for a class without a name."""
    annotations = read_annotations(file, "--csv", None)
    read_labels(labels, [annotations], "--labels")
    return Listing(annotations)


def write_index(listing: Listing, out: str, threads: int | None = None) -> list[Row]:
    """Probe all files of a listing in parallel and write the index, whose rows are in the same order. A path is written
    with the bytes that it has, be they UTF-8 or not. Raises `UserError` if the index can't be written, or if a file has
    two classes."""
    folder = absolute(os.path.dirname(out))
    missing = {_path_in_index(path, folder) for path in listing.missing}
    wanted: dict[str, int] = {}
    for path, label in zip(listing.clips.paths, listing.clips.labels, strict=True):
        if wanted.setdefault(_path_in_index(path, folder), label) != label:
            first = wanted[_path_in_index(path, folder)]
            raise UserError(f"{path}: is listed twice, with class {first} and with class {label}")
    with locked(Path(f"{out}.partial"), "flperf index") as partial:
        probed = _probe_files(folder, {path: wanted[path] for path in wanted if path not in missing}, partial, threads)
        rows = [probed[path] if path in probed else Row(path, label, error=MISSING) for path, label in wanted.items()]
        write_rows(Path(out), rows)
        Path(partial.name).unlink(missing_ok=True)
    return rows


def write_rows(out: Path, rows: list[Row]) -> None:
    """Write an index, complete or not at all."""
    with atomic_file(out) as unfinished, open(unfinished, "w", **TEXT) as lines:
        writer = csv.DictWriter(lines, HEADER)
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def check_options(out: str, inputs: dict[str, str | None], threads: int | None) -> None:
    """Raise `UserError` for an unusable option before the work begins; creates the folder of `out`. `inputs` are the
    files that options name."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads: must be at least 1, is {threads}")
    for option, file in inputs.items():
        if file and os.path.realpath(out) == os.path.realpath(file):
            raise UserError(f"--out: {out} is the file of {option}, which it would overwrite; name another")
    if os.path.isdir(out or "."):
        raise UserError(f"--out: {out} is a folder; name a file, such as {os.path.join(out, 'index.csv')}")
    if os.path.exists(out) and not _is_replaceable(out):
        raise UserError(f"--out: {out} exists and is not an index; name another file, or remove it")
    folder = Path(out).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} can't be written: {error.strerror}: {error.filename}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--out: {out} can't be written: the folder {folder} is read-only")


def _is_replaceable(out: str) -> bool:
    """Whether an existing file is an index, of this or another version, or empty."""
    if not os.path.isfile(out):
        return False
    with writing(Path(out)), open(out, "rb") as content:
        head = content.read(1000)
    return not head or head.removeprefix(b"\xef\xbb\xbf").startswith(",".join(HEADER[:3]).encode())


def _path_in_index(path: str, folder: str) -> str:
    """A path as the index holds it: an absolute one as it is, another relative to the folder of the index, unless that
    leads up from a link, which the system and a user follow differently."""
    found = absolute(path)
    relative = os.path.relpath(found, folder)
    leads_up = relative.split(os.sep)[0] == os.pardir
    return found if os.path.isabs(path) or (leads_up and os.path.realpath(folder) != folder) else relative


def _probe_files(folder: str, wanted: dict[str, int], partial: TextIO, threads: int | None) -> dict[str, Row]:
    """Probe the files (path → label) that are not in the partial index yet, and append them to it; all rows by path."""
    # A label may have been corrected since.
    complete = _complete_rows(Path(partial.name))
    probed = {row.path: replace(row, label=wanted[row.path]) for row in complete if row.path in wanted}
    todo = [(path, label) for path, label in wanted.items() if path not in probed]
    with ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool:
        writer = csv.DictWriter(partial, HEADER)
        if not probed:
            partial.truncate(0)
            writer.writeheader()
        found = pool.map(lambda item: probe_file(folder, *item), todo)
        for row in tqdm(found, total=len(wanted), initial=len(probed), desc="probing", unit="file", disable=None):
            writer.writerow(asdict(row))
            probed[row.path] = row
    partial.flush()
    return probed


def summary(rows: list[Row], left_out: LeftOut | None = None) -> str:
    """Numbers of files by codec, resolution, length and error, and of what was left out, as text."""
    usable = [row for row in rows if not row.error]
    lines = [
        f"{len(usable)} of {len(rows)} files are usable, {sum(row.duration for row in usable) / 3600:.2f} "
        "hours of video"
    ]
    lines += [
        f"  {count:8} {codec} in {pixels}"
        for (codec, pixels), count in Counter((row.codec, row.pixel_format) for row in usable).most_common()
    ]
    sizes = Counter((row.width, row.height) for row in usable)
    if sizes:
        most = ", ".join(f"{w} x {h} ({count})" for (w, h), count in sizes.most_common(3))
        lines.append(f"  {len(sizes):8} resolutions, most often {most}")
    if len(sizes) > MANY_RESOLUTIONS:
        lines.append(
            "  NVDEC is set up again for every new size; `flperf prepare` writes files of one size, which decode faster"
        )
    lines += _lengths(usable) if usable else []
    notes = Counter(note.partition(":")[0] for row in usable for note in row.notes.split("; ") if note)
    lines += [f"  {count:8} files: {note}" for note, count in notes.most_common()]
    reasons = Counter(row.error for row in rows if row.error)
    lines += [f"  {count:8} unusable: {reason}" for reason, count in reasons.most_common()]
    lines += [f"  {line}" for line in describe_left_out(left_out or {})]
    return "\n".join(map(printable, lines))


def _lengths(usable: list[Row]) -> list[str]:
    """How long the files are, compared with the window of the reference configurations."""
    by_length = sorted(usable, key=lambda row: row.duration)
    shortest, median, longest = (
        f"{row.duration:.2f} s ({row.frames} frames)"
        for row in (by_length[0], by_length[len(by_length) // 2], by_length[-1])
    )
    short = sum(REFERENCE_WINDOW.is_short(row.frames, row.seconds) for row in usable)
    lines = [
        f"           the shortest file has {shortest}, the median {median}, the longest {longest}",
        f"  {short:8} files are shorter than a clip of the reference configurations, {REFERENCE_WINDOW.describe()}: "
        "see dataset.short_clips",
    ]
    variable = sum(row.is_variable for row in usable)
    if variable:
        lines.append(f"  {variable:8} files have a variable frame rate: dataset.fps takes their frames by time")
    return lines


def _rows(file: str | Path, key: str) -> Iterator[Row]:
    rows = csv_rows(str(file), key, INDEX_FILE)
    _, header = next(rows, (1, HEADER))
    for number, cells in rows:
        try:
            row = dict(zip(header, cells, strict=True))
            class_index(row.get("label", ""))
            yield Row(**{field.name: field.type(row[field.name]) for field in fields(Row) if field.name in row})
        except ValueError as error:
            reason = f": {error}" if "class index" in str(error) else ""
            raise UserError(f"{file}: row {number}: is not a row of an index ({','.join(header)}){reason}") from None


def _complete_rows(partial: Path) -> list[Row]:
    """The complete rows that an interrupted run wrote; an incomplete last row is removed."""
    if not has_header(str(partial), HEADER):
        return []
    content = partial.read_bytes()
    end = content.rfind(b"\n") + 1
    while content.count(b'"', 0, end) % 2:  # a line break in a path: the row is not complete
        end = content.rfind(b"\n", 0, end - 1) + 1
    with writing(partial):
        partial.write_bytes(content[:end])
    return list(_rows(partial, "--out"))
