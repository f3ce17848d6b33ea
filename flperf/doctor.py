"""`flperf doctor`: is everything here that a run needs, and if not, which command mends it?

Each check returns one line; a lost one makes the exit status 1, so that a job script can stop before it waits in a queue. With --config
it also opens the data, decodes clips and loads the backbone, as a run would.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from flperf.command import command_parser

CLIPS = 10
NEEDED_DISK_GB, NEEDED_SHARED_GB = 20, 1


@dataclass(frozen=True)
class Finding:
    """`mend` is empty where all is well."""

    subject: str
    text: str
    mend: str = ""

    def __str__(self) -> str:
        return f"{'LOST' if self.mend else 'ok':>4}  {self.subject:<12} {self.text}" + (f"\n      -> {self.mend}" if self.mend else "")


def packages() -> Iterator[Finding]:
    """Installed versions against those that pyproject.toml pins."""
    from packaging.requirements import Requirement

    wrong = []
    for line in requires("flperf") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        if installed is None or not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement} (found {installed})")
    python = f"Python {sys.version.split()[0]}, flperf {version('flperf')}"
    yield Finding("packages", ", ".join(wrong), "pip install -e .") if wrong else Finding("packages", f"{python}, all as pinned")


def gpu() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        note = f"torch is built for CUDA {built}, but finds no device" if built else "torch is a CPU build"
        present = Path("/proc/driver/nvidia/version").exists()
        mend = "this machine has an NVIDIA driver: reinstall torch from the public index, or update the driver" if present else ""
        yield Finding("GPU", f"none: runs go to the CPU ({note})", mend)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding("GPU", f"{index}: {device.name}, {device.total_memory / 1e9:.0f} GB, sm_{device.major}{device.minor}")


def decoding() -> Iterator[Finding]:
    import av
    import torch

    missing = [codec for codec in ("h264", "hevc", "vp9", "av1") if codec not in av.codecs_available]
    text = f"PyAV {av.__version__}" + (f", without {', '.join(missing)}" if missing else ", H.264, HEVC, VP9, AV1")
    yield Finding("decoding", text, "pip install --force-reinstall av" if missing else "")
    try:
        import nvidia.dali

        text = f"DALI {nvidia.dali.__version__}"
    except ImportError as error:
        yield Finding("decoding", f"DALI can't be imported: {error}", "pip install nvidia-dali-cuda130, or dataset.decoder=pyav")
        return
    if torch.cuda.is_available():
        try:
            ctypes.CDLL("libnvcuvid.so.1")
        except OSError:
            mend = "start the container with NVIDIA_DRIVER_CAPABILITIES=all (or video,compute,utility), or use dataset.decoder=pyav"
            yield Finding("decoding", f"{text}; NVDEC's library libnvcuvid.so.1 is missing", mend)
            return
        text += ", NVDEC"
    yield Finding("decoding", text)


def attention() -> Iterator[Finding]:
    """Which operator the reference heads (width 128) would use."""
    import torch

    from flperf.engine import compute_dtype
    from flperf.heads.layers import attention_operator

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = compute_dtype("auto", device)
    yield Finding("attention", f"{attention_operator(128, dtype, device)}, {str(dtype).removeprefix('torch.')}")


def compiler() -> Iterator[Finding]:
    """torch.compile writes C++ on a CPU; on a GPU Triton still builds its launcher with a C compiler."""
    import triton

    found = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    text = f"{shutil.which(found)}, Triton {triton.__version__}" if found else "no C++ compiler"
    yield Finding("compiler", text, "" if found else "apt install g++ (or engine.compile=false)")


def engine() -> Iterator[Finding]:
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    device, backend = accelerator.device_name(), accelerator.communication_backend_name()
    text = f"DeepSpeed {deepspeed.__version__} on {device}"
    if torch.cuda.is_available() and device != "cuda":
        yield Finding("engine", f"{text}, though there is a GPU", "unset DS_ACCELERATOR")
        return
    if backend == "ccl":
        yield Finding("engine", f"{text}, oneCCL bindings are installed", "pip uninstall oneccl_bind_pt: flperf uses gloo on CPUs")
        return
    yield Finding("engine", f"{text}, {'nccl' if device == 'cuda' else 'gloo'}")


def space() -> Iterator[Finding]:
    for folder, needed, mend in (
        (".", NEEDED_DISK_GB, "set experiment=DIR to a larger disk, or lower checkpoint.keep"),
        ("/dev/shm", NEEDED_SHARED_GB, "start the container with --shm-size=8g or --ipc=host"),
    ):
        free = shutil.disk_usage(folder).free / 1e9
        yield Finding("space", f"{free:.0f} GB free in {Path(folder).resolve()}", mend if free < needed else "")


def tracking() -> Iterator[Finding]:
    from flperf.config import Tracking
    from flperf.dashboards import wandb_mode_and_project

    mode, _ = wandb_mode_and_project(Tracking())
    states = {
        "online": "logs online",
        "offline": "logs offline (`wandb login`, or later the `wandb sync` that a run prints at its end)",
        "disabled": "disabled by WANDB_MODE or wandb's settings",
    }
    yield Finding("W&B", states.get(mode, mode))


def hub() -> Iterator[Finding]:
    """No request is made: a token and the local cache are what a job on a closed node has."""
    from huggingface_hub import constants, get_token

    cached = sorted(path.name.removeprefix("models--").replace("--", "/") for path in Path(constants.HF_HUB_CACHE).glob("models--*"))
    access = "offline" if constants.HF_HUB_OFFLINE else f"online {'with' if get_token() else 'without'} a token"
    yield Finding("hub", f"{access}; in the cache: {', '.join(cached) or 'nothing'}")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    packages, gpu, decoding, attention, compiler, engine, space, tracking, hub,
)  # fmt: skip


def configured(path: str, overrides: list[str]) -> Iterator[Finding]:
    """What a run of this configuration opens first: data, backbone, a few clips."""
    from flperf.config import UserError, load_config

    try:
        config = load_config(path, overrides)
        yield Finding("config", f"{path}: a {config.model.head} on {config.backbone.kind}, {config.dataset.kind}")
        from flperf.engine import start_process
        from flperf.run import build_run, describe

        run = build_run(config, start_process(), training=False)
        yield from (Finding("run", line) for line in describe(run).splitlines())
        split = "validation" if run.dataset.validation_size else "train"
        clips = min(CLIPS, len(run.dataset.splits[split]))
        skipped, read = [], 0
        for batch in run.dataset.chosen_batches([range(clips)], run.place.micro_batch_size, split, run.process.device):
            skipped += batch.skipped
            read += int(batch.valid.sum())
        examples = "; ".join(f"{clip}: {reason}" for clip, reason in skipped[:3])
        mend = f"see what is wrong with them: flperf index --csv {config.dataset.train} --out index.csv" if skipped else ""
        yield Finding("clips", f"{read} of {clips} {split} clips read" + (f" ({examples})" if skipped else ""), mend)
    except UserError as error:
        yield Finding("config", str(error), "mend that key, then run the same command again")


def doctor(arguments: list[str]) -> None:
    """`flperf doctor`: print every finding; exit status 1 if anything is lost."""
    parser = command_parser(
        "doctor",
        "Say what this machine has for a run, and what is missing; the exit status is 1 if anything is lost.",
        "flperf doctor --config configs/references/vjepa2_kinetics_400.yaml dataset.train=/data/k400/train.csv",
    )
    parser.add_argument("--config", metavar="FILE", help="also open its data and backbone, and decode ten clips")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a key of the file")
    options = parser.parse_intermixed_args(arguments)
    lost = 0
    for check in CHECKS:
        for finding in check():
            print(finding, flush=True)
            lost += bool(finding.mend)
    if options.config:
        for finding in configured(options.config, options.overrides):
            print(finding, flush=True)
            lost += bool(finding.mend)
    print("all is well" if not lost else f"{lost} lost")
    sys.exit(1 if lost else 0)
