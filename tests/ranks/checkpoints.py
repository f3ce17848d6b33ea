"""What the ranks of a test do with checkpoints: write, fill, resume and damage them.

Reference states come from DeepSpeed's own accessors, not from the code under test.
"""

import contextlib
import io
import resource
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state
from runs import TINY
from safetensors.torch import load_file, save_file
from torch import Tensor

from flperf.config import parse_config
from flperf.engine.checkpoint import Checkpoints
from flperf.engine.checkpoint_files import candidates, read_index, read_weights, stored_fragments
from flperf.engine.deepspeed_internals import unsharded_masters
from flperf.engine.engine import build_engine, head_weights
from flperf.engine.optimizer import set_schedule
from flperf.engine.process import batch_share, start_process
from flperf.engine.sharded_state import held_fragments, state_tensors
from flperf.errors import UserError
from flperf.models.heads import build_head
from flperf.models.latents import latent_geometry

# One weight above 100,000 elements, which ZeRO 3 does not keep gathered; 37 divides into no number of processes.
HEAD = ["name=head", "model.hidden_dim=160", "model.depth=1", "model.num_heads=2", "trainer.batch_size=8"]
LATENTS = (4, 2, 2, 37)  # t h w d
STAGES = ("0", "1", "1 accumulated", "2", "3")  # in bf16 DeepSpeed accumulates at ZeRO 1 with an optimizer of its own


def new_engine(*overrides: str):
    process = start_process()
    config = parse_config(TINY.format(folder="unused"), "tiny", [*HEAD, *overrides])
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    geometry = latent_geometry(config, *LATENTS)
    head = build_head(config.model, geometry, seed=0, compile=False)
    return build_engine(head, config, batch_share(config.trainer, process), dtype, process.device), config, dtype


def train(engine, config, dtype, steps: int) -> None:
    generator = torch.Generator().manual_seed(dist.get_rank())
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


def write_states(folder: str, precision: str) -> int:
    """Three steps at ZeRO 2, then a checkpoint beside the state as DeepSpeed reads it; returns how many tensors."""
    engine, config, dtype = new_engine("engine.zero_stage=2", f"engine.precision={precision}")
    train(engine, config, dtype, steps=3)
    checkpoints = Checkpoints(engine, Path(folder), keep=2)
    checkpoints.save(3)
    state = named_state(engine)
    if dist.get_rank() == 0:
        save_file(state, Path(folder, "reference.safetensors"))
    checkpoints.close()
    return len(state)


def read_all_states(folder: str) -> dict[str, list[str]]:
    cases = [(precision, stage) for precision in ("fp32", "bf16") for stage in STAGES]
    return {
        f"{precision} ZeRO {stage}": read_states(f"{folder}/{precision}", precision, stage)
        for precision, stage in cases
    }


def read_states(folder: str, precision: str, stage: str) -> list[str]:
    """Names of what differs from the reference: in the engine after `resume`, in its parameters, and in a checkpoint
    written from it."""
    accumulated = ["trainer.micro_batch_size=1"] if stage == "1 accumulated" else []
    overrides = [f"engine.zero_stage={stage[0]}", f"engine.precision={precision}", *accumulated]
    engine, _, dtype = new_engine(*overrides)
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

    again = Path(folder, f"again-{dist.get_world_size()}-{stage}")
    checkpoints = Checkpoints(engine, again, keep=2)
    checkpoints.save(4)
    checkpoints.close()
    (written,) = candidates(again)
    return different + stored_differences(written, reference) if dist.get_rank() == 0 else different


def begin_again(folder: str) -> dict[str, list[str]]:
    """By stages: what two updates differ in after a checkpoint of the untrained head, against two without it."""
    found = {}
    for written, read in (("0", "3"), ("1", "0"), ("3", "2")):
        engine, *_ = new_engine(f"engine.zero_stage={written}")
        first = Checkpoints(engine, Path(folder, written), keep=1)
        first.save(0)
        first.close()
        states = []
        for resumed in (False, True):
            engine, config, dtype = new_engine(f"engine.zero_stage={read}")
            if resumed:
                Checkpoints(engine, Path(folder, written), keep=1).resume()
            train(engine, config, dtype, steps=2)
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
    """Make every element of the state a function of the step."""
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


def save_until_killed(folder: str, ready: Connection) -> None:
    """Resume, send the step and whether its state is intact on all ranks, then save without end."""
    engine, config, dtype = new_engine("engine.zero_stage=1")
    checkpoints = Checkpoints(engine, Path(folder), keep=2)
    step = checkpoints.resume()
    if step:
        intact = torch.tensor(is_filled(engine, step))
        dist.all_reduce(intact, dist.ReduceOp.MIN)
    else:
        train(engine, config, dtype, steps=1)
        intact = torch.tensor(True)
    ready.send({"step": step, "intact": bool(intact)})
    while True:
        step += 1
        fill(engine, step)
        checkpoints.save(step)


def write_filled(folder: str, steps: list[int]) -> None:
    """Checkpoints of several steps; the state changes as soon as `save` returns."""
    engine, config, dtype = new_engine("engine.zero_stage=2")
    train(engine, config, dtype, steps=1)
    checkpoints = Checkpoints(engine, Path(folder), keep=len(steps))
    for step in steps:
        fill(engine, step)
        checkpoints.save(step)
        fill(engine, 999)
    checkpoints.close()


def resume_from(folders: list[str]) -> list[dict]:
    return [resume_once(Path(folder)) for folder in folders]


def resume_once(folder: Path) -> dict:
    """The step, whether the state is that step's, and what was printed; or the error."""
    engine, *_ = new_engine("engine.zero_stage=3")
    checkpoints, said = Checkpoints(engine, folder, keep=2), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            step = checkpoints.resume()
        return {"step": step, "intact": is_filled(engine, step), "said": said.getvalue()}
    except UserError as error:
        return {"error": str(error)}


def fill_disk(folder: str, limit: str) -> dict:
    """Save on a full disk (a full tmpfs, or no file of rank 1 above a size); then again with room."""
    engine, config, dtype = new_engine("engine.zero_stage=2")
    train(engine, config, dtype, steps=1)
    checkpoints, filler = Checkpoints(engine, Path(folder), keep=2), Path(folder).with_name("filler")
    fill(engine, 1)
    checkpoints.save(1)
    checkpoints.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit == "tmpfs" and dist.get_rank() == 0:
        room = shutil.disk_usage(filler.parent).free - 2**20
        filler.write_bytes(bytes(room))
    elif limit == "size" and dist.get_rank() == 1:
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
    found = resume_once(Path(folder))
    fill(engine, 2)
    checkpoints.save(2)
    checkpoints.close()
    return {"error": error, "left": left, "latest": latest, "found": found, "after": resume_once(Path(folder))}
