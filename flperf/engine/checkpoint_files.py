"""A checkpoint on disk, and how it is known to be whole. Nothing here needs an engine or a process group.

    checkpoints/
      step_00000500/
        rank_00000.safetensors …   what each process held: flat fp32 fragments `weight/<parameter>`,
        `exp_avg/<parameter>`, …;
                                   the file's metadata says with which element of the parameter each begins
        checkpoint.json            step, shapes, and size and checksum of every file
      latest                       the name of the newest

A folder is written as `step_….unfinished` and renamed when all of it is on disk, then `latest` is replaced: a kill at
any moment leaves the checkpoints before it as they were. Checksums (64-bit words summed modulo 2^64, which runs at
the speed of memory) show any single wrong bit. safetensors because a reader takes the slices it needs, with no
unpickling, at any number of processes.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from flperf.errors import UserError
from flperf.files import word_sum, write_atomically, writing

INDEX = "checkpoint.json"
LATEST = "latest"
BLOCK = 2**24  # bytes summed, then written, while they are in the cache


class Damaged(UserError):
    """A file of a checkpoint is missing or is not what was written; the text begins with its path."""


@dataclass(frozen=True)
class Index:
    """What a checkpoint holds."""

    step: int  # updates done or skipped, hence the place in the data
    skipped_updates: int
    optimizer_step: int
    zero_stage: int  # of the run that wrote it; any other reads it
    world_size: int
    states: list[str]
    parameters: dict[str, list[int]]  # shapes
    files: dict[str, dict[str, int]] = field(default_factory=dict)  # by name: bytes and checksum


def unfinished_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written; `commit` gives it its name."""
    return folder / f"step_{step:08d}.unfinished"


def shard_header(starts: dict[str, int], lengths: dict[str, int]) -> bytes:
    """The head of a safetensors file of flat fp32 tensors, one after another: `lengths` by tensor, `starts` by
    parameter."""
    entries: dict = {"__metadata__": {"start": json.dumps(starts)}}
    offset = 0
    for key, numel in lengths.items():
        entries[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + 4 * numel]}
        offset += 4 * numel
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, header: bytes, data: Tensor) -> dict[str, int]:
    """Write `data` (fp32 [n] on the host) behind its header, down to the disk; returns size and checksum. Like all
    that writes here, it raises `UserError` that names the file."""
    content, total = data.numpy().view(np.uint8), 0
    with writing(path), open(path, "wb") as file:
        blocks = (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))
        for block in (np.frombuffer(header, np.uint8), *blocks):
            total += word_sum(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(header) + len(content), "checksum": total % 2**64}


def index_text(index: Index) -> str:
    content = asdict(index)
    return json.dumps({"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest(), **content}, indent=1) + "\n"


def read_index(folder: Path) -> Index:
    """Raises `Damaged` unless the file is, to the letter, what was written."""
    path = folder / INDEX
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        del content["sha256"]
        index = Index(**content)
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError):
        raise Damaged(f"{path}: is not the index of a checkpoint") from None
    if index_text(index) != text:
        raise Damaged(f"{path}: does not have the checksum it was written with")
    return index


def check(folder: Path, part: int = 0, parts: int = 1) -> Index:
    """Read the index and every `parts`-th file from the `part`-th on. Raises `Damaged` at the first that isn't what
    was written."""
    index = read_index(folder)
    for name in list(index.files)[part::parts]:
        _check_file(folder / name, **index.files[name])
    return index


def _check_file(path: Path, bytes: int, checksum: int) -> None:
    total, buffer = 0, np.empty(BLOCK, np.uint8)
    try:
        size = path.stat().st_size
        if size != bytes:
            raise Damaged(f"{path}: has {size} bytes instead of {bytes}")
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += word_sum(buffer[:count])
    except OSError as error:
        raise Damaged(f"{path}: {error.strerror}") from None
    if total % 2**64 != checksum:
        raise Damaged(f"{path}: does not have the checksum it was written with")


def begin(unfinished: Path) -> None:
    """Make the folder to write into, in place of what interrupted writes left."""
    with writing(unfinished):
        for left in unfinished.parent.glob("step_*.*"):
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)


def commit(unfinished: Path, index: Index, keep: int) -> None:
    """Make a folder whose shards are on disk the newest checkpoint, and drop all but the `keep` newest."""
    folder, final = unfinished.parent, unfinished.with_suffix("")
    write_atomically(unfinished / INDEX, index_text(index))
    with writing(unfinished):
        if final.exists():  # damaged, so that the run went back, or killed before `latest` named it
            _remove(final)
        os.rename(unfinished, final)
        write_atomically(folder / LATEST, final.name)
        for old in candidates(folder)[keep:]:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Under another name first: a kill must not leave half a folder that looks like a checkpoint."""
    dropped = checkpoint.with_suffix(".dropped")
    os.rename(checkpoint, dropped)
    shutil.rmtree(dropped)


def candidates(folder: Path) -> list[Path]:
    """The checkpoint that `latest` names and those before it, newest first; all of them if `latest` is lost or what
    it names is."""
    steps = [path.name for path in folder.glob("step_*") if _is_tag(path.name)]
    latest = folder / LATEST
    named = latest.read_text(errors="replace").strip() if latest.exists() else ""
    if named in steps:
        steps = [step for step in steps if step <= named]
    elif _is_tag(named):
        steps.append(named)  # whoever reads it learns that it is missing
    return [folder / step for step in sorted(steps, reverse=True)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in a run's `checkpoints` folder that is complete and undamaged, or None. Reads all of its
    files."""
    for checkpoint in candidates(folder):
        try:
            check(checkpoint)
        except Damaged:
            continue
        return checkpoint
    return None


def stored_fragments(folder: Path, index: Index) -> Iterator[tuple[str, int, dict]]:
    """Every stored fragment as parameter, first element, and by state a slice [numel] that reads what is taken from
    it."""
    for file in index.files:
        with safe_open(folder / file, framework="pt") as shard:
            for name, start in json.loads(shard.metadata()["start"]).items():
                yield name, start, {state: shard.get_slice(f"{state}/{name}") for state in index.states}


def read_weights(checkpoint: Path, average: bool) -> dict[str, Tensor]:
    """The head's full fp32 weights by parameter name, or their moving average (before the first update: the weights).

    Raises `Damaged`, and `UserError` if the run kept no average.
    """
    index = check(checkpoint)
    state = "ema" if average and index.optimizer_step else "weight"
    if state not in index.states:
        raise UserError(f"{checkpoint}: holds no moving average, as trainer.ema_decay was null")
    weights = {name: torch.full(shape, torch.nan) for name, shape in index.parameters.items()}
    for name, start, slices in stored_fragments(checkpoint, index):
        fragment = slices[state][:]
        weights[name].view(-1)[start : start + len(fragment)] = fragment
    return weights


def _is_tag(name: str) -> bool:
    return re.fullmatch(r"step_\d{8,}", name) is not None
