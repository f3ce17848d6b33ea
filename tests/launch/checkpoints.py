"""Started by tests/test_checkpoint.py: writes, kills, damages and resumes checkpoints, and reports what happened.

Usage: checkpoints.py CONFIG.yaml FOLDER RESULTS.json [TMPFS]. The processes of a world are forked from this one, so
that the imports are paid for once. Reference states come from DeepSpeed's own accessors, not from the code under
test.
"""

import contextlib
import gc
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from curves import curve
from deepspeed.utils import safe_get_full_optimizer_state
from runs import free_port
from safetensors.torch import load_file, save_file
from torch import Tensor

from flperf.config import load_config
from flperf.engine.checkpoint import Checkpoints
from flperf.engine.checkpoint_files import Damaged, candidates, check, read_index, read_weights, stored_fragments
from flperf.engine.engine import build_engine, head_weights, unsharded_masters
from flperf.engine.optimizer import set_schedule
from flperf.engine.process import batch_share, start_process
from flperf.engine.sharded_state import held_fragments, state_tensors
from flperf.errors import UserError
from flperf.models.heads import build_head
from flperf.models.latents import latent_geometry

# One weight above 100,000 elements, which ZeRO 3 does not keep gathered; 37 divides into no number of processes.
HEAD = ["model.hidden_dim=160", "model.depth=1", "model.num_heads=2", "trainer.batch_size=8"]
LATENTS = (4, 2, 2, 37)  # t h w d
STAGES = ("0", "1", "1 accumulated", "2", "3")  # in bf16 DeepSpeed accumulates at ZeRO 1 with an optimizer of its own
CONFIG = ""


def fork_world(size: int, work: Callable, *arguments) -> list[int]:
    """Start `work(process, *arguments)` in forked processes that form a group; returns their ids."""
    port, started = free_port(), []
    # a child that collected the imports' objects, too, would copy their pages: longer than a writer lives before its
    # kill
    gc.freeze()
    for rank in range(size):
        child = os.fork()
        if child == 0:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
            signal.alarm(240)
            status = 1
            try:
                work(start_process(), *arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        started.append(child)
    return started


def run_world(size: int, work: Callable, *arguments) -> list:
    """What `work` returned on each process, by rank."""
    folder = Path(os.environ["RESULT_FOLDER"])

    def report(process, *arguments) -> None:
        (folder / f"{process.rank}.json").write_text(json.dumps(work(process, *arguments)))

    children = fork_world(size, report, *arguments)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), f"{work.__name__}: a process failed ({statuses})"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def new_engine(process, *overrides: str):
    config = load_config(CONFIG, [*HEAD, *overrides])
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    geometry = latent_geometry(config, *LATENTS)
    head = build_head(config.model, geometry, seed=0, compile=False)
    return build_engine(head, config, batch_share(config.trainer, process), dtype, process.device), config, dtype


def train(process, engine, config, dtype, steps: int) -> None:
    generator = torch.Generator().manual_seed(process.rank)
    for step in range(steps):
        set_schedule(engine, step, config.trainer, 10)
        for _ in range(engine.gradient_accumulation_steps()):
            context = torch.randn(2, 2, *LATENTS[1:], generator=generator).to(dtype)
            engine.backward((engine(context).float() - context.float()).square().mean())
            engine.step()


def named_state(engine) -> dict[str, Tensor]:
    """The full state by "state/parameter" and the count of updates, read by DeepSpeed's own functions (a
    collective)."""
    weights, averages = head_weights(engine, average=False), head_weights(engine, average=True)
    state = {f"weight/{name}": tensor for name, tensor in weights.items()} | {
        f"ema/{name}": tensor for name, tensor in averages.items()
    }
    masters, optimizer = unsharded_masters(engine), engine.basic_optimizer
    for name, parameter in engine.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            whole = (
                optimizer.state[masters[parameter]][key] if masters else safe_get_full_optimizer_state(parameter, key)
            )
            state[f"{key}/{name}"] = whole
    state["step"] = torch.stack([state["step"] for state in optimizer.state.values()]).unique()
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


def write_states(process, folder: str, precision: str) -> int:
    """Three steps at ZeRO 2, then a checkpoint beside the state as DeepSpeed tells it."""
    engine, config, dtype = new_engine(process, "engine.zero_stage=2", f"engine.precision={precision}")
    train(process, engine, config, dtype, steps=3)
    checkpoints = Checkpoints(engine, Path(folder), keep=2)
    checkpoints.save(3)
    state = named_state(engine)
    if process.is_main:
        save_file(state, Path(folder, "reference.safetensors"))
    checkpoints.close()
    return len(state)


def read_all_states(process, folder: str) -> dict[str, list[str]]:
    cases = [(precision, stage) for precision in ("fp32", "bf16") for stage in STAGES]
    return {
        f"{precision} ZeRO {stage}": read_states(process, f"{folder}/{precision}", precision, stage)
        for precision, stage in cases
    }


def read_states(process, folder: str, precision: str, stage: str) -> list[str]:
    """Names of what differs from the reference: in the engine after `resume`, in its parameters, and in a checkpoint
    written from it."""
    accumulated = ["trainer.micro_batch_size=1"] if stage == "1 accumulated" else []
    engine, _, dtype = new_engine(
        process, f"engine.zero_stage={stage[0]}", f"engine.precision={precision}", *accumulated
    )
    checkpoints = Checkpoints(engine, Path(folder), keep=2)
    resumed = checkpoints.resume(), engine.global_steps, engine.skipped_steps
    different = [] if resumed == (3, 3, 0) else [f"resumed at {resumed}"]
    reference, state = load_file(Path(folder, "reference.safetensors")), named_state(engine)
    different += [key for key in reference.keys() | state.keys() if not torch.equal(reference[key], state[key])]
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == "3"):
        for name, parameter in engine.module.named_parameters():
            if not torch.equal(parameter.data, reference[f"weight/{name}"].to(dtype)):
                different.append(f"parameter {name}")
    checkpoints.close()

    again = Path(folder, f"again-{process.world_size}-{stage}")
    checkpoints = Checkpoints(engine, again, keep=2)
    checkpoints.save(4)
    checkpoints.close()
    (written,) = candidates(again)
    return different + stored_differences(written, reference) if process.is_main else different


def begin_again(process, folder: str) -> dict[str, list[str]]:
    """By stages: what two updates differ in after a checkpoint of the untrained head, against two without it."""
    found = {}
    for written, read in (("0", "3"), ("1", "0"), ("3", "2")):
        engine, *_ = new_engine(process, f"engine.zero_stage={written}")
        first = Checkpoints(engine, Path(folder, written), keep=1)
        first.save(0)
        first.close()
        states = []
        for resumed in (False, True):
            engine, config, dtype = new_engine(process, f"engine.zero_stage={read}")
            if resumed:
                Checkpoints(engine, Path(folder, written), keep=1).resume()
            train(process, engine, config, dtype, steps=2)
            states.append(named_state(engine))
        found[f"{written} {read}"] = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    return found


def stored_differences(written: Path, reference: dict[str, Tensor]) -> list[str]:
    stored = {f"weight/{name}": tensor for name, tensor in read_weights(written, average=False).items()}
    stored |= {f"ema/{name}": tensor for name, tensor in read_weights(written, average=True).items()}
    different = [f"stored {key}" for key, tensor in stored.items() if not torch.equal(tensor, reference[key])]
    for name, start, slices in stored_fragments(written, read_index(written)):
        for key in ("exp_avg", "exp_avg_sq"):
            part = slices[key][:]
            if not torch.equal(part, reference[f"{key}/{name}"].flatten()[start : start + len(part)]):
                different.append(f"stored {key}/{name}")
    return different


def fill(engine, step: int) -> None:
    """A state that says which step it is of, element by element."""
    for name, fragment in held_fragments(engine).items():
        for number, tensor in enumerate(state_tensors(engine, fragment).values()):
            tensor.copy_(
                torch.arange(fragment.start, fragment.start + fragment.numel) + 7 * number + len(name) + 1000 * step
            )


def is_filled(engine, step: int) -> bool:
    held = {name: state_tensors(engine, fragment) for name, fragment in held_fragments(engine).items()}
    found = {name: {key: tensor.clone() for key, tensor in tensors.items()} for name, tensors in held.items()}
    fill(engine, step)
    return all(
        torch.equal(found[name][key], tensor) for name, tensors in held.items() for key, tensor in tensors.items()
    )


def save_until_killed(process, folder: str, ready: int, report: str) -> None:
    engine, config, dtype = new_engine(process, "engine.zero_stage=1")
    checkpoints = Checkpoints(engine, Path(folder), keep=2)
    step = checkpoints.resume()
    if step:
        intact = torch.tensor(is_filled(engine, step))
        dist.all_reduce(intact, dist.ReduceOp.MIN)
    else:
        train(process, engine, config, dtype, steps=1)
        intact = torch.tensor(True)
    if process.is_main:
        Path(report).write_text(json.dumps({"step": step, "intact": bool(intact)}))
    os.write(ready, b"!")
    while True:
        step += 1
        fill(engine, step)
        checkpoints.save(step)


def kill_writers(folder: Path, rounds: int) -> dict:
    """Kill both processes of a world at a random moment of its writes, again and again; what did each find?"""
    moments, found, unfinished, damaged = random.Random(0), [], 0, []
    for number in range(rounds):
        here, there = os.pipe()
        report = folder.with_name(f"report_{number}.json")
        children = fork_world(2, save_until_killed, str(folder), there, str(report))
        os.close(there)
        for _ in children:
            assert os.read(here, 1), "a writer ended"
        os.close(here)
        time.sleep(moments.uniform(0, 0.15))
        for child in children:
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        found.append(json.loads(report.read_text()))
        unfinished += any(folder.glob("*.unfinished"))
        for checkpoint in candidates(folder):
            try:
                check(checkpoint)
            except Damaged as damage:
                damaged.append(str(damage))
    return {"found": found, "unfinished": unfinished, "damaged": damaged}


def write_filled(process, folder: str, steps: list[int]) -> None:
    """Checkpoints of several steps; the state changes as soon as `save` returns."""
    engine, config, dtype = new_engine(process, "engine.zero_stage=2")
    train(process, engine, config, dtype, steps=1)
    checkpoints = Checkpoints(engine, Path(folder), keep=len(steps))
    for step in steps:
        fill(engine, step)
        checkpoints.save(step)
        fill(engine, 999)
    checkpoints.close()


def resume_from(process, *folders: str) -> list[dict]:
    return [resume_once(process, Path(folder)) for folder in folders]


def resume_once(process, folder: Path) -> dict:
    engine, *_ = new_engine(process, "engine.zero_stage=3")
    checkpoints, said = Checkpoints(engine, folder, keep=2), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            step = checkpoints.resume()
        return {"step": step, "intact": is_filled(engine, step), "said": said.getvalue()}
    except UserError as error:
        return {"error": str(error)}


def fill_disk(process, folder: str, limit: str) -> dict:
    """Save on a full disk (a full tmpfs, or no file of rank 1 above a size); then again with room."""
    engine, config, dtype = new_engine(process, "engine.zero_stage=2")
    train(process, engine, config, dtype, steps=1)
    checkpoints, filler = Checkpoints(engine, Path(folder), keep=2), Path(folder).with_name("filler")
    fill(engine, 1)
    checkpoints.save(1)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == "tmpfs" and process.is_main:
        room = shutil.disk_usage(filler.parent).free - 2**20
        filler.write_bytes(bytes(room))
    elif limit == "size" and process.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    dist.barrier()
    fill(engine, 2)
    checkpoints.save(2)
    error = None
    try:
        while checkpoints.writing is not None:
            time.sleep(0.01)
            checkpoints.check()
    except UserError as raised:
        error = str(raised)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    left = sorted(path.name for path in Path(folder).iterdir())
    latest = Path(folder, "latest").read_text()
    filler.unlink(missing_ok=True)
    found = resume_once(process, Path(folder))
    fill(engine, 2)
    checkpoints.save(2)
    checkpoints.close()
    return {"error": error, "left": left, "latest": latest, "found": found, "after": resume_once(process, Path(folder))}


def loss_curve(process, config: str, name: str, *overrides: str) -> dict:
    return curve(config, name, list(overrides), process)


def damages(folder: Path) -> dict:
    """Resume on two processes after harm to the newest of two checkpoints, or to both."""
    write = folder / "whole"
    run_world(2, write_filled, str(write), [1, 2])

    def truncate(path: Path) -> None:
        os.truncate(path, path.stat().st_size - 4)

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)

    harms = {
        "none": [],
        "flipped shard": [(flip, "step_00000002/rank_00001.safetensors")],
        "truncated shard": [(truncate, "step_00000002/rank_00000.safetensors")],
        "truncated index": [(truncate, "step_00000002/checkpoint.json")],
        "missing folder": [(shutil.rmtree, "step_00000002")],
        "lost latest": [(Path.unlink, "latest")],
        "both": [(flip, "step_00000002/rank_00000.safetensors"), (truncate, "step_00000001/rank_00001.safetensors")],
    }
    for name, steps in harms.items():
        shutil.copytree(write, folder / name)
        for harm, path in steps:
            harm(folder / name / path)
    by_rank = run_world(2, resume_from, *(str(folder / name) for name in harms))
    return dict(zip(harms, zip(*by_rank, strict=True), strict=True))


def main() -> None:
    global CONFIG
    CONFIG, place, results, *tmpfs = sys.argv[1:]
    folder = Path(place)
    os.environ["RESULT_FOLDER"] = str(folder)
    report: dict = {"states": {}, "curves": {}, "disk": {}}
    for precision in ("fp32", "bf16"):
        report["tensors"] = run_world(2, write_states, str(folder / "states" / precision), precision)[0]
    for world_size in (1, 4):
        report["states"][world_size] = run_world(world_size, read_all_states, str(folder / "states"))

    report["untrained"] = run_world(1, begin_again, str(folder / "untrained"))[0]

    run_folder = Path(load_config(CONFIG, []).experiment)
    common = ["trainer.max_steps=6", "dataset.shapes.validation_clips=0"]
    report["curves"]["whole"] = run_world(1, loss_curve, CONFIG, "whole", *common, "engine.zero_stage=0")[0]
    report["curves"]["first"] = run_world(
        2, loss_curve, CONFIG, "first", *common, "engine.zero_stage=2", "trainer.stop_after=3"
    )[0]
    for world_size, stage in ((1, 0), (4, 3)):
        name = f"rest on {world_size}"
        shutil.copytree(run_folder / "first", run_folder / name)
        report["curves"][name] = run_world(world_size, loss_curve, CONFIG, name, *common, f"engine.zero_stage={stage}")[
            0
        ]

    report["damage"] = damages(folder / "damages")
    report["disk"]["size"] = run_world(2, fill_disk, str(folder / "limited" / "checkpoints"), "size")
    if tmpfs:
        report["disk"]["tmpfs"] = run_world(2, fill_disk, str(Path(tmpfs[0], "checkpoints")), "tmpfs")
    report["killed"] = kill_writers(folder / "killed", rounds=15)
    Path(results).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
