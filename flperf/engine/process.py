"""Starts this process as one of a run's: rank, device, compute dtype and share of a batch."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import deepspeed
import torch
import torch.distributed as dist

from flperf.config import Engine, Trainer
from flperf.data.cores import cores_per_process
from flperf.data.samplers import BatchShare
from flperf.engine.deepspeed_internals import require_known_version, skip_shm_build
from flperf.engine.devices import peak_flops
from flperf.errors import UserError


@dataclass(frozen=True)
class Process:
    """The rank of this process among `world_size`, and the device that it computes on."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_process(timeout: float = Engine.timeout) -> Process:
    """Join the process group that the launcher (deepspeed, torchrun, srun) describes in the environment. Without a
    launcher the group has one process. Collectives fail after `timeout` seconds.

    Raises `UserError` if DeepSpeed's version is not a known one.
    """
    require_known_version()
    for name, alone in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, alone)
    os.environ.setdefault("MASTER_PORT", "29500" if int(os.environ["WORLD_SIZE"]) > 1 else "0")
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(cores_per_process())
    deepspeed.utils.logger.setLevel("WARNING")
    skip_shm_build()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout))
        # The group's threads must end before the interpreter does, which may abort otherwise.
        atexit.register(dist.destroy_process_group)
    return Process(dist.get_rank(), local_rank, dist.get_world_size(), device)


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """bf16 or fp32; "auto" is bf16 where the device multiplies matrices faster in it."""
    if precision == "auto":
        return torch.bfloat16 if bf16_is_faster(device) else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


@lru_cache
def bf16_is_faster(device: torch.device) -> bool:
    """Whether matrix products are faster in bf16 than in fp32. True for a GPU with bf16. Measured on a CPU with bf16
    instructions: some are twice as fast in bf16, some half as fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    native = torch.cpu._is_avx512_bf16_supported()  # emulated bf16 is never faster
    return native and peak_flops(device, torch.bfloat16) > peak_flops(device, torch.float32)


def batch_share(trainer: Trainer, process: Process) -> BatchShare:
    """Divide the clips of one update among processes: batch_size = micro_batch_size * accumulation_steps * processes.

    The batch size shapes the result, so it is the same at any number of processes; the micro-batch size adapts.
    Raises `UserError` if the number of processes does not divide the batch size.
    """
    share, rest = divmod(trainer.batch_size, process.world_size)
    if rest or not share:
        raise UserError(
            f"trainer.batch_size: {trainer.batch_size} clips cannot be divided evenly among "
            f"{process.world_size} processes; start a number of processes that divides it"
        )
    wanted = trainer.micro_batch_size or share
    micro = max(size for size in range(1, min(wanted, share) + 1) if share % size == 0)
    if micro != wanted and process.is_main:
        print(
            f"trainer.micro_batch_size: {wanted} does not divide the {share} clips of a process; "
            f"using {micro} x {share // micro}"
        )
    return BatchShare(process.rank, process.world_size, micro, trainer.batch_size)
