"""Writes a dataset's videos again as files that decode fast, with an index of each split: the work of `flperf prepare`.

A folder holds

    clips/XX/….mp4             the files, named by a hash of the original's path; a file is renamed into place when it
                               is complete
    progress/rank_….jsonl      a line for every file that is done or can't be read, from which any number of processes
                               resumes
    train.csv, validation.csv  indices as `flperf index` writes them; written last: the set is complete if they exist
    prepared.json              what was done to the frames, and what it costs
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from flperf.commands.latent_writer import datasets_by_folder
from flperf.commands.preparation_cost import Cost, measure_cost
from flperf.commands.set_progress import FOLDER, Record, appending, read_records, state_of
from flperf.config import Config, differences
from flperf.data import WITHOUT_VIDEO, prepare_dataset
from flperf.data.annotations import Annotations
from flperf.data.clip_writer import CODEC, OPTIONS, Plan, check_times, write_clip
from flperf.data.cores import cores_per_process
from flperf.data.index import write_rows
from flperf.data.loader import use_one_thread
from flperf.data.prepared import IDENTITY, is_prepared, read_identity
from flperf.data.preprocessing import Preprocessing
from flperf.data.probing import Row, probe_file
from flperf.data.pyav import opened
from flperf.data.unreadable import BadClip
from flperf.data.video_file import VideoFile
from flperf.engine.process import Process
from flperf.errors import UserError
from flperf.files import atomic_file, locked, make_folder, write_atomically, writing

logger = logging.getLogger(__name__)

TIMEOUT = 7 * 24 * 3600  # seconds that processes wait for the one whose videos are the longest
LOCK = "prepare.lock"


def prepare_set(config: Config, process: Process, out: Path, short_side: int | None) -> None:
    """Write the files of all splits and sources, their indices, and what the preparation costs. A collective.

    Raises `UserError` if the folder holds anything else, or can't be written.
    """
    if config.dataset.kind in WITHOUT_VIDEO or config.dataset.kind == "bouncing_shapes":
        raise UserError(f"dataset.kind: {config.dataset.kind!r} has no video files; prepare needs them")
    if process.local_rank == 0:
        prepare_dataset(config)
    dist.barrier()
    preprocessing = Preprocessing.of(config.backbone)
    if short_side is not None and short_side < max(preprocessing.smallest):
        raise UserError(
            f"--short-side: frames for this backbone are {preprocessing.describe()}; set it to at least "
            f"{max(preprocessing.smallest)} (smaller videos are not enlarged)"
        )
    # Files that are too short for this window may do for another.
    whole = replace(config, dataset=replace(config.dataset, short_clips="pad"))
    splits = {
        name: dataset.splits[split] for name, (dataset, split) in datasets_by_folder(whole, preprocessing).items()
    }
    plan = Plan(preprocessing, short_side)
    with ExitStack() as stack:
        together(lambda: _claim(out, plan, stack) if process.is_main else None, process)
        writer = SetWriter(out, plan, splits, process)
        together(lambda: writer.write(config.dataset.threads or cores_per_process()), process)
        records = read_records(out)
        together(lambda: writer.write_indices(records), process)  # after all have read
        cost = measure_cost(config, process, writer.pairs(records))
        together(lambda: writer.report(records, cost) if process.is_main else None, process)


def together(work: Callable[[], None], process: Process) -> None:
    """Do this process's part of some work, and wait for the others. All raise the first `UserError` of any of them, so
    that none waits for one that has ended."""
    problem = None
    try:
        work()
    except UserError as error:
        problem = str(error)
    problems: list[str | None] = [None] * process.world_size
    dist.all_gather_object(problems, problem)
    first = next((problem for problem in problems if problem), None)
    if first:
        raise UserError(first)


class SetWriter:
    """The files of one set, of which this process writes its share. `splits` are the clips by the name of their
    index."""

    def __init__(self, out: Path, plan: Plan, splits: dict[str, Annotations], process: Process):
        self.out, self.plan, self.splits, self.process = out, plan, splits, process
        # A file that is named several times is written once.
        paths = (path for annotations in splits.values() for path in annotations.paths)
        self.sources = list(dict.fromkeys(map(os.path.abspath, paths)))

    def write(self, threads: int) -> None:
        """Write this process's share of the files: those that are not there yet, several at a time."""
        found = read_records(self.out)
        self._refuse_others(found)
        mine = self.sources[self.process.rank :: self.process.world_size]
        todo = [source for source in mine if source not in found or not found[source].is_done(self.out)]
        quiet = None if self.process.is_main else True
        progress = self.out / FOLDER / f"rank_{self.process.rank:05d}.jsonl"
        with (
            appending(progress) as append,
            tqdm(total=len(mine), initial=len(mine) - len(todo), desc="preparing", unit="file", disable=quiet) as bar,
        ):
            for record in each_completed(self._prepare, todo, threads):
                append(record)
                bar.update()

    def write_indices(self, records: dict[str, Record]) -> None:
        """Write the index of every split; files that can't be read have a row with the reason. Every process calls it,
        so that all end if a split has no usable file; the first one writes."""
        for name, annotations in self.splits.items():
            rows = []
            for path, label in zip(annotations.paths, annotations.labels, strict=True):
                rows.append(replace(records[os.path.abspath(path)].row, label=label))
            index, left_out = self.out / f"{name}.csv", sum(bool(row.error) for row in rows)
            if self.process.is_main:
                write_rows(index, rows)
            if left_out == len(rows):
                raise UserError(f"{index}: none of its files can be read; its column 'error' gives the reasons")
            reasons = f", {left_out} can't be read: the column 'error' gives the reasons" if left_out else ""
            if self.process.is_main:
                print(f"{index}: {len(rows) - left_out} of {len(rows)} clips{reasons}", flush=True)

    def pairs(self, records: dict[str, Record]) -> list[tuple[str, str]]:
        """(original, prepared file) of all files that can be compared."""
        done = (records[source] for source in self.sources if not records[source].row.error)
        return [(record.source, str(self.out / record.row.path)) for record in done if os.path.exists(record.source)]

    def report(self, records: dict[str, Record], cost: Cost | None) -> None:
        """Say what the preparation costs, store it, and remove what killed processes left."""
        for unfinished in (self.out / "clips").glob("*/*.unfinished"):
            unfinished.unlink(missing_ok=True)
        done = [records[source] for source in self.sources if not records[source].row.error]
        before, after = sum(record.state[0] for record in done), sum(record.bytes for record in done)
        sizes = {"files": len(done), "left_out": len(self.sources) - len(done)}
        sizes |= {"bytes_before": before, "bytes_after": after}
        known = (read_identity(self.out, "--out") or {}).get("cost")  # if the originals are gone
        content = identity(self.plan) | {"shrunk": any(record.shrunk for record in done), **sizes}
        content |= {"cost": asdict(cost) if cost else known}
        write_atomically(self.out / IDENTITY, json.dumps(content, indent=1))
        print(
            f"{self.out}: {before / 1e9:.3g} GB before, {after / 1e9:.3g} GB prepared ({after / before:.2f} times as "
            f"much)\n{cost.describe() if cost else 'the originals are gone: nothing to compare with'}",
            flush=True,
        )

    def _refuse_others(self, found: dict[str, Record]) -> None:
        """Raise `UserError` if the folder holds files that the dataset does not name: its indices would lose them."""
        others = sorted({source for source in found if not found[source].row.error} - set(self.sources))
        if others:
            raise UserError(
                f"--out: {self.out} holds {len(others)} clips that this dataset does not name (the first: "
                f"{others[0]}); choose another --out or remove the folder"
            )

    def _prepare(self, source: str) -> Record:
        """Write one file. Raises `UserError` if it can't be written, or is a prepared one itself."""
        path, state = self._path(source), state_of(source)
        try:
            with opened(source) as file:
                if is_prepared(file):
                    raise UserError(f"{source}: was prepared already; name the original files in the configuration")
                shrunk = self._write(file, self.out / path)
        except BadClip as error:
            reason = " ".join(error.args[1].split())
            logger.warning("left out: %s: %s", source, reason)
            return Record(source, state, 0, False, Row(source, 0, error=reason))
        row = probe_file(str(self.out), path, 0)
        return Record(source, state, state_of(self.out / path)[0], shrunk, row)

    def _write(self, file: VideoFile, target: Path) -> bool:
        """Write the frames of a file into place; returns whether --short-side shrunk them."""
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_file(target) as unfinished:
                preparation = write_clip(file, unfinished, self.plan)
                with VideoFile(str(unfinished)) as written:
                    check_times(written, file.timeline.times)
        except BaseException:
            target.with_name(f"{target.name}.unfinished").unlink(missing_ok=True)
            raise
        return preparation.shrunk

    def _path(self, source: str) -> str:
        """Path of the prepared file in the folder: the same for every process and every start."""
        digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", Path(source).stem)[:60]
        return f"clips/{digest[:2]}/{stem}-{digest}.mp4"


def identity(plan: Plan) -> dict:
    """What is the same for all files of a set."""
    return plan.of_set().as_json() | {"encoder": {"codec": CODEC, **OPTIONS}}


def _claim(out: Path, plan: Plan, stack: ExitStack) -> None:
    """Start in an empty folder, or resume in one of the same preparation. No other command uses it until `stack` is
    closed."""
    make_folder(out)
    if not (out / LOCK).exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} holds files that `flperf prepare` did not write; choose another --out")
    stack.enter_context(locked(out / LOCK, "flperf prepare"))
    found = read_identity(out, "--out")
    expected = identity(plan)
    if found is None and (out / FOLDER).exists():
        raise UserError(
            f"--out: {out} holds prepared files, but no {IDENTITY} that describes them; choose another --out"
        )
    if found is None:
        write_atomically(out / IDENTITY, json.dumps(expected, indent=1))
        return
    same = {key: found.get(key) for key in expected if key not in ("shown", "shrunk")}
    changed = differences(same, {key: json.loads(json.dumps(expected[key])) for key in same})
    if changed:
        raise UserError(
            f"{out / IDENTITY}: the folder was prepared in another way ({'; '.join(changed)}); choose another --out or "
            "remove the folder"
        )


def each_completed(function, items: list[str], threads: int) -> Iterator[Any]:
    """`function` of each item in a pool of threads, in the order in which they end. The first error ends all."""
    with ThreadPoolExecutor(threads, "flperf-prepare", use_one_thread, (torch.get_num_threads(),)) as pool:
        tasks: list[Future] = [pool.submit(function, item) for item in items]
        try:
            for task in as_completed(tasks):
                yield task.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
