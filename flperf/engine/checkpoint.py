"""Saves a run in the background and resumes it at any number of processes and any ZeRO stage.

Training waits only while the state is copied to host memory; a thread then writes that copy, one write at a time. The
threads of all processes communicate in a gloo group of their own, independently of training. `latest` therefore moves
only when every file is on disk, and a write that fails on one process raises an error on all. When resuming, each
process reads only the parts that it holds.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import TypeVar

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from tqdm import tqdm

from flperf.config import differences
from flperf.engine import checkpoint_files as files
from flperf.engine.deepspeed_internals import copy_masters_to_parameters, restore_counters
from flperf.engine.sharded_state import (
    allocate_states,
    held_fragments,
    optimizer_step,
    parameter_shapes,
    state_tensors,
    written_fragments,
)
from flperf.errors import UserError

T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run. All processes call every method, except `check`.

    If a write in the background fails, the next call raises its `UserError`, which names the file. Earlier checkpoints
    and `latest` stay as they were.
    """

    def __init__(self, engine: DeepSpeedEngine, folder: Path, keep: int):
        self.engine, self.folder, self.keep = engine, folder, keep
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.group = dist.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.writing: Future | None = None
        self.newest: int | None = None  # the step that was last read, or written completely
        self.host = torch.empty(0)  # what the thread writes; reused, because allocating it takes as long as copying

    def resume(self) -> int:
        """Load the newest undamaged checkpoint and return its step, or 0 if there is no checkpoint. Raises `UserError`
        if all are damaged."""
        problems = []
        for path in self._together(lambda: files.candidates(self.folder))[0]:
            found = [problem for problem in self._together(partial(self._problem, path)) if problem]
            if not found:
                return self._load(path, files.read_index(path))
            problems.append(found[0])
            if self.rank == 0:
                print(f"{found[0]}: skipping {path.name}, trying the checkpoint before it", flush=True)
        if problems:
            raise UserError(
                f"no undamaged checkpoint is left ({'; '.join(problems)}): restore one, or start over with --overwrite"
            )
        return 0

    def save(self, step: int) -> None:
        """Copy the state after `step` updates to the host and start to write it. Waits for the previous write."""
        self.wait()
        if step == self.newest:
            return
        header, states = self._copy_to_host()
        index = files.Index(
            step=step,
            skipped_updates=self.engine.skipped_steps,
            optimizer_step=optimizer_step(self.engine),
            zero_stage=self.engine.zero_optimization_stage(),
            world_size=self.world_size,
            states=states,
            parameters=parameter_shapes(self.engine),
        )
        self.writing = self.thread.submit(self._write, index, header)

    def check(self) -> None:
        """Raise the error of a failed write, without waiting for one in progress."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the write in progress, if there is one."""
        writing, self.writing = self.writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the write in progress, then end the thread and the process group."""
        self.wait()
        self.thread.shutdown()
        dist.destroy_process_group(self.group)

    def _copy_to_host(self) -> tuple[bytes, list[str]]:
        """Fill `host` with the fragments that this process writes, in the order of the file. Returns the header of the
        file and the names of the states."""
        fragments = written_fragments(self.engine, self.rank, self.world_size)
        tensors = {
            f"{state}/{name}": tensor
            for name, fragment in fragments.items()
            for state, tensor in state_tensors(self.engine, fragment).items()
        }
        lengths = {key: tensor.numel() for key, tensor in tensors.items()}
        if sum(lengths.values()) != self.host.numel():
            self.host = torch.empty(sum(lengths.values()), pin_memory=self.engine.device.type == "cuda")
        for target, tensor in zip(self.host.split(list(lengths.values())), tensors.values(), strict=True):
            target.copy_(tensor, non_blocking=True)
        if self.engine.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        header = files.shard_header({name: fragment.start for name, fragment in fragments.items()}, lengths)
        return header, list(dict.fromkeys(key.partition("/")[0] for key in tensors))

    def _write(self, index: files.Index, header: bytes) -> None:
        """Runs in the thread: write `host`; on the main process also complete the checkpoint."""
        unfinished = files.unfinished_folder(self.folder, index.step)
        shard = unfinished / f"rank_{self.rank:05d}.safetensors"
        try:
            self._on_main(lambda: files.begin(unfinished))
            entries = self._together(lambda: (shard.name, files.write_shard(shard, header, self.host)))
            self._on_main(lambda: files.commit(unfinished, replace(index, files=dict(entries)), self.keep))
            self.newest = index.step
        except Exception:
            if self.rank == 0:
                rmtree(unfinished, ignore_errors=True)  # the logs may need the space
            raise

    def _on_main(self, work: Callable[[], None]) -> None:
        self._together(lambda: work() if self.rank == 0 else None)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every process and return the results of all. If it raises on one process, raise on all."""
        result, failure = None, None
        try:
            result = work()
        except Exception as error:  # of any kind, because the other processes wait for the result
            failure = error
        everyone: list = [None] * self.world_size
        dist.all_gather_object(everyone, (result, None if failure is None else str(failure)), group=self.group)
        if failure is not None:
            raise failure
        for _, text in everyone:
            if text is not None:
                raise UserError(text)
        return [result for result, _ in everyone]

    def _problem(self, path: Path) -> str | None:
        """The damage in this process's share of a checkpoint's files, or None."""
        try:
            files.check(path, self.rank, self.world_size)
        except files.Damaged as damage:
            return str(damage)
        return None

    def _load(self, path: Path, index: files.Index) -> int:
        engine = self.engine
        changed = differences(index.parameters, parameter_shapes(engine))
        if changed:
            raise UserError(f"{path}: is of another head ({changed[0]}); set name=... for a new run")
        fragments = held_fragments(engine)
        allocate_states(engine, fragments, index.states, index.optimizer_step)
        targets = {name: state_tensors(engine, fragment) for name, fragment in fragments.items()}
        filled = 0
        stored = files.stored_fragments(path, index)
        for name, start, slices in tqdm(
            stored, f"loading {path.name}", unit="part", leave=False, disable=self.rank > 0 or None
        ):
            if name in fragments:
                filled += sum(
                    copy_overlap(slices[state], start, targets[name][state], fragments[name].start)
                    for state in index.states
                )
        if filled != len(index.states) * sum(fragment.numel for fragment in fragments.values()):
            raise UserError(f"{path}: some elements of the head are missing")
        copy_masters_to_parameters(engine)
        restore_counters(engine, index.step, index.skipped_updates)
        self.newest = index.step
        return index.step


def copy_overlap(source, source_start: int, target: Tensor, target_start: int) -> int:
    """Copy the elements that a stored slice and `target` have in common; returns their number. The starts are positions
    in the same flattened parameter."""
    first = max(source_start, target_start)
    last = min(source_start + source.get_shape()[0], target_start + len(target))
    if last > first:
        target[first - target_start : last - target_start] = source[first - source_start : last - source_start]
    return max(0, last - first)
