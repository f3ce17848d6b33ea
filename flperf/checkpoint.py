"""Save and resume a run: DeepSpeed's own files, with `latest` moved only when all of them are complete.

A checkpoint is written into its own folder `step_XXXXXXXX`; `latest` names the newest complete one and is replaced in one atomic
rename. A kill at any moment therefore leaves `latest` on a checkpoint that loads; a folder it does not name yet is written anew.
"""

import os
import re
import shutil
from pathlib import Path

import deepspeed
import torch.distributed as dist

from flperf.config import UserError


def save_checkpoint(engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, keep: int) -> Path:
    """Write head, optimizer (with EMA) and step of all processes, then move `latest`, then drop all but the `keep` newest."""
    tag = f"step_{step:08d}"
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)  # what a killed process left of this very step
    dist.barrier()
    engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False)
    _sync_files(folder / tag)
    dist.barrier()
    if dist.get_rank() == 0:
        _write_atomically(folder / "latest", tag)
        for old in complete_checkpoints(folder)[:-keep]:
            shutil.rmtree(folder / old)
    return folder / tag


def resume(engine: deepspeed.DeepSpeedEngine, folder: Path) -> int:
    """Load the checkpoint that `latest` names; returns its step, 0 if there is none. Raises `UserError` if it can't be loaded."""
    latest = folder / "latest"
    if not latest.exists():
        return 0
    tag = latest.read_text().strip()
    try:
        path, client_state = engine.load_checkpoint(str(folder), tag=tag, load_lr_scheduler_states=False)
    except Exception as error:  # DeepSpeed and pickle raise anything here; what matters is which checkpoint it was
        raise UserError(f"{folder / tag}: cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if path is None:
        raise UserError(f"{folder / tag}: named by {latest}, but there is no checkpoint")
    return client_state["step"]


def complete_checkpoints(folder: Path) -> list[str]:
    """Tags up to the one `latest` names, oldest first; a later folder was never completed."""
    latest = (folder / "latest").read_text().strip()
    tags = sorted(path.name for path in folder.iterdir() if re.fullmatch(r"step_\d+", path.name))
    return [tag for tag in tags if tag <= latest]


def _sync_files(folder: Path) -> None:
    """Put this host's files on disk before `latest` may name them."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
