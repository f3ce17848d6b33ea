"""An index of a dataset's files: one CSV with the properties of each file. Training takes it instead of the dataset's
CSV.

Probing demuxes a file from end to end and decodes its first frame. So an index lists files that are missing, empty, cut
short or not videos before a run opens them, and training with it leaves them out. It is written row by row beside its
final name and renamed when complete; an interrupted run continues with the rows it has.
"""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import av
import torch
from tqdm import tqdm

from flperf.data.annotations import CLIPS_FILE, Annotations, has_header, read_annotations, read_labels
from flperf.data.pyav import display_matrix, turn
from flperf.data.video_file import DECODE_ERRORS, VideoFile, describe
from flperf.errors import UserError
from flperf.files import atomic_file

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
MANY_RESOLUTIONS = 64  # NVDEC keeps a decoder for each size; above this number the summary advises fewer


@dataclass(frozen=True)
class Row:
    """One file. If `error` gives a reason, the file is unusable and the numbers may be 0."""

    path: str  # absolute, or relative to the index
    label: int
    codec: str = ""
    pixel_format: str = ""
    width: int = 0
    height: int = 0
    frames: int = 0
    frame_rate: float = 0.0  # frames a second, on average
    duration: float = 0.0  # seconds
    error: str = ""
    notes: str = ""  # what is unusual about a usable file


HEADER = [field.name for field in fields(Row)]


def is_index(file: str | None) -> bool:
    """Whether a CSV is an index, by its first line."""
    return has_header(file, HEADER)


def read_index(file: str, limit: int | None) -> Annotations:
    """The usable files of an index, the first `limit` of them; paths are relative to the index."""
    rows = [row for row in _rows(file) if not row.error][:limit]
    if not rows:
        raise UserError(f"{file}: none of its files is usable; its column 'error' gives the reasons")
    folder = os.path.dirname(file)
    return Annotations([os.path.join(folder, row.path) for row in rows], [row.label for row in rows])


def write_index(source: str, labels: str | None, out: str, threads: int | None = None) -> list[Row]:
    """Probe all files of a Kinetics CSV, or of a folder of class folders, in parallel, and write the index. Its rows
    are in the order of the CSV, or of the files' names; a repeated file is kept once.

    Raises `UserError` that names the row or the option at fault.
    """
    _check_options(source, labels, out, threads)
    if Path(source).is_dir():
        annotations = read_folder(Path(source), labels)
    else:
        annotations = read_annotations(source, "--csv", None)
        read_labels(labels, [annotations], "--labels")
    folder = Path(out).absolute().parent
    wanted = {
        os.path.relpath(path, folder) if not os.path.isabs(path) else path: label
        for path, label in zip(annotations.paths, annotations.labels, strict=True)
    }
    partial = Path(f"{out}.partial")
    probed = _probe_files(folder, wanted, partial, threads)
    rows = [probed[path] for path in wanted]
    with atomic_file(Path(out)) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, HEADER)
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    partial.unlink()
    return rows


def _probe_files(folder: Path, wanted: dict[str, int], partial: Path, threads: int | None) -> dict[str, Row]:
    """Probe the files (path → label) that are not in the partial index yet, and append them to it; all rows by path."""
    # A label may have been corrected since.
    probed = {row.path: replace(row, label=wanted[row.path]) for row in _complete_rows(partial) if row.path in wanted}
    missing = [(path, label) for path, label in wanted.items() if path not in probed]
    with (
        open(partial, "a" if probed else "w", newline="", encoding="utf-8") as lines,
        ThreadPoolExecutor(threads or 2 * (os.cpu_count() or 1)) as pool,
    ):
        writer = csv.DictWriter(lines, HEADER)
        if not probed:
            writer.writeheader()
        found = pool.map(lambda item: probe_file(folder, *item), missing)
        for row in tqdm(found, total=len(wanted), initial=len(probed), desc="probing", unit="file", disable=None):
            writer.writerow(asdict(row))
            probed[row.path] = row
    return probed


def read_folder(folder: Path, labels: str | None) -> Annotations:
    """The videos of a folder with one folder for each class; videos directly in it are of the class "unlabelled".

    The file `labels` numbers the classes. If it does not exist, it is written, with the classes in the order of their
    names; a second split that is read with it gets the same numbers. Raises `UserError` for a folder without videos and
    for a class that the file does not name.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise UserError(f"--folder: {folder} holds no videos ({', '.join(sorted(VIDEO_SUFFIXES))})")
    parts = [path.relative_to(folder).parts for path in files]
    classes = [part[0] if len(part) > 1 else "unlabelled" for part in parts]
    if labels and not Path(labels).exists():
        Path(labels).write_text(
            "".join(f"{number} {name}\n" for number, name in enumerate(sorted(set(classes)))), encoding="utf-8"
        )
    names = read_labels(labels, [Annotations([], [])], "--labels") if labels else sorted(set(classes))
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise UserError(
            f"--folder: {folder / unknown[0]}: {labels} has no such class; add it there, or name another file with "
            "--labels"
        )
    return Annotations([str(path.absolute()) for path in files], [names.index(name) for name in classes])


def probe_file(folder: Path, path: str, label: int) -> Row:
    """Demux one file and decode its first frame; `path` is relative to `folder`. A file whose packets don't show its
    frames is decoded from end to end."""
    try:
        with VideoFile(os.path.join(folder, path)) as file:
            first, context = file.first_frame(), file.context
            frames, duration = len(file.timeline), file.timeline.duration
            height, width = turn(torch.empty(first.height, first.width, 1), first).shape[:2]
            return Row(
                path,
                label,
                codec=context.name,
                pixel_format=context.pix_fmt or "",
                width=width,
                height=height,
                frames=frames,
                frame_rate=round(frames / duration if duration else float(file.stream.average_rate or 0), 4),
                duration=round(duration, 4),
                error="the first frame is damaged" if first.is_corrupt else "",
                notes="; ".join(_notes(file, first)),
            )
    except DECODE_ERRORS as error:
        return Row(path, label, error=" ".join(describe(error).split()))


def _notes(file: VideoFile, first: av.VideoFrame) -> Iterator[str]:
    """What a user should know about a usable file."""
    if file.is_cut_short:
        yield f"cut short: {file.timeline.duration:.2f} of {file.promised_seconds:.2f} s"
    shape = file.stream.sample_aspect_ratio
    if shape and shape != 1:
        yield f"pixels are not square: {shape.numerator}:{shape.denominator}"
    if display_matrix(first):
        yield "turned or mirrored"
    if file.timeline.counted:
        yield f"frames are counted by decoding: {file.timeline.counted}"


def summary(rows: list[Row]) -> str:
    """Numbers of files by codec, resolution and error, as text."""
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
    lines.append(
        f"  {len(sizes):8} resolutions, most often "
        + ", ".join(f"{w} x {h} ({count})" for (w, h), count in sizes.most_common(3))
    )
    if len(sizes) > MANY_RESOLUTIONS:
        lines.append(
            "  a GPU's decoder is set up again for every new size: videos transcoded to a few sizes decode faster"
        )
    notes = Counter(note.partition(":")[0] for row in usable for note in row.notes.split("; ") if note)
    lines += [f"  {count:8} {note}" for note, count in notes.most_common()]
    reasons = Counter(row.error for row in rows if row.error)
    lines += [f"  {count:8} unusable: {reason}" for reason, count in reasons.most_common()]
    return "\n".join(lines)


def _check_options(source: str, labels: str | None, out: str, threads: int | None) -> None:
    """Raise `UserError` for an unusable option before the work begins; creates the folder of `out`."""
    if threads is not None and threads < 1:
        raise UserError(f"--threads: must be at least 1, is {threads}")
    if not Path(source).exists():
        raise UserError(
            f"--csv or --folder: there is no {source}; point --csv to {CLIPS_FILE}, or --folder to a folder of "
            "class folders"
        )
    for option, file in (("--csv", source), ("--labels", labels)):
        if file and Path(out).resolve() == Path(file).resolve():
            raise UserError(f"--out: {out} is the file of {option}, which it would overwrite; name another")
    if Path(out).is_dir():
        raise UserError(f"--out: {out} is a folder; name a file, such as {Path(out) / 'index.csv'}")
    try:
        Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} can't be written: {error.strerror}: {error.filename}") from None


def _rows(file: str | Path) -> Iterator[Row]:
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        next(reader)
        for number, cells in enumerate(reader, start=2):
            try:
                row = dict(zip(HEADER, cells, strict=True))
                yield Row(**{field.name: field.type(row[field.name]) for field in fields(Row)})
            except ValueError:
                raise UserError(f"{file}: row {number}: is not a row of an index ({','.join(HEADER)})") from None


def _complete_rows(partial: Path) -> list[Row]:
    """The complete rows that an interrupted run wrote; an incomplete last line is removed."""
    if not is_index(str(partial)):
        return []
    text = partial.read_bytes()
    partial.write_bytes(text[: text.rfind(b"\n") + 1])
    return list(_rows(partial))
