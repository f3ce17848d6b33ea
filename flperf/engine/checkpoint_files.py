"""Files of a checkpoint: layout, atomic writing, and detection of damage. Needs no engine and no process group.

    checkpoints/
      step_00000500/
        rank_00000.safetensors …   one file for each process, with flat fp32 fragments `weight/<parameter>`,
                                   `exp_avg/<parameter>`, …; its metadata holds the position of each fragment's first
                                   element in the flattened parameter
        checkpoint.json            step, shapes, and size and checksum of every file
      latest                       the name of the newest checkpoint

A folder is written as `step_….unfinished`, renamed when all its files are on disk, and then named in `latest`. A kill
at any moment therefore leaves the earlier checkpoints intact. The checksum is the sum of 64-bit words modulo 2^64: it
is as fast as memory and detects any single wrong bit. The format is safetensors because each process can read the
slices that it needs, without unpickling.
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
BLOCK = 2**24  # bytes that are summed and then written while they are in the cache


class Damaged(UserError):
    """A file of a checkpoint is missing or damaged; the message begins with its path."""


@dataclass(frozen=True)
class Index:
    """The content of checkpoint.json."""

    step: int  # updates, skipped ones included; determines the position in the data
    skipped_updates: int
    optimizer_step: int
    zero_stage: int  # of the run that wrote the checkpoint; all stages can read it
    world_size: int
    states: list[str]
    parameters: dict[str, list[int]]  # shapes
    files: dict[str, dict[str, int]] = field(default_factory=dict)  # by file name: bytes and checksum


def unfinished_folder(folder: Path, step: int) -> Path:
    """The folder in which the checkpoint of `step` is written; `commit` renames it."""
    return folder / f"step_{step:08d}.unfinished"


def shard_header(starts: dict[str, int], lengths: dict[str, int]) -> bytes:
    """The header of a safetensors file of flat fp32 tensors. lengths: elements by tensor, in the order of the file.
    starts: by parameter, the position of the fragment's first element."""
    entries: dict = {"__metadata__": {"start": json.dumps(starts)}}
    offset = 0
    for key, numel in lengths.items():
        entries[key] = {"dtype": "F32", "shape": [numel], "data_offsets": [offset, offset + 4 * numel]}
        offset += 4 * numel
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(path: Path, header: bytes, data: Tensor) -> dict[str, int]:
    """Write `header` and `data` (fp32 [n] on the host) and wait until they are on disk. Returns size and checksum.

    Raises `UserError` that names the file, like all functions here that write.
    """
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
    """Read checkpoint.json. Raises `Damaged` unless every byte is as it was written."""
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
    """Read the index and check every `parts`-th file, beginning with number `part`. Raises `Damaged` for the first
    file that is not as it was written."""
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
    """Make the folder to write into, and remove what interrupted writes have left."""
    with writing(unfinished):
        for leftover in unfinished.parent.glob("step_*.*"):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)


def commit(unfinished: Path, index: Index, keep: int) -> None:
    """Make a folder whose shards are on disk the newest checkpoint, and remove all but the `keep` newest."""
    folder, final = unfinished.parent, unfinished.with_suffix("")
    write_atomically(unfinished / INDEX, index_text(index))
    with writing(unfinished):
        if final.exists():  # a damaged checkpoint, or one whose writer was killed before it updated `latest`
            _remove(final)
        os.rename(unfinished, final)
        write_atomically(folder / LATEST, final.name)
        for old in candidates(folder)[keep:]:
            _remove(old)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a kill cannot leave a half-removed folder that looks like a
    checkpoint."""
    dropped = checkpoint.with_suffix(".dropped")
    os.rename(checkpoint, dropped)
    shutil.rmtree(dropped)


def candidates(folder: Path) -> list[Path]:
    """The checkpoint that `latest` names and earlier ones, newest first. All checkpoints if `latest` or the checkpoint
    that it names is missing."""
    steps = [path.name for path in folder.glob("step_*") if _is_tag(path.name)]
    latest = folder / LATEST
    named = latest.read_text(errors="replace").strip() if latest.exists() else ""
    if named in steps:
        steps = [step for step in steps if step <= named]
    elif _is_tag(named):
        steps.append(named)  # reading it reports that it is missing
    return [folder / step for step in sorted(steps, reverse=True)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete and undamaged checkpoint in a run's `checkpoints` folder, or None. Reads all of its files."""
    for checkpoint in candidates(folder):
        try:
            check(checkpoint)
        except Damaged:
            continue
        return checkpoint
    return None


def stored_fragments(folder: Path, index: Index) -> Iterator[tuple[str, int, dict]]:
    """Every stored fragment: the parameter's name, the position of its first element, and by state a slice [numel],
    which reads only the elements that are taken from it."""
    for file in index.files:
        with safe_open(folder / file, framework="pt") as shard:
            for name, start in json.loads(shard.metadata()["start"]).items():
                yield name, start, {state: shard.get_slice(f"{state}/{name}") for state in index.states}


def read_weights(checkpoint: Path, average: bool) -> dict[str, Tensor]:
    """Full fp32 weights of the head by parameter name, or their moving average. Before the first update there is no
    average, and the weights are returned.

    Raises `Damaged`, or `UserError` if the run kept no average.
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
