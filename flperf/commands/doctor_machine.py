"""The checks of `flperf doctor` that need no configuration: packages, devices, compiler, disk, services."""

import ctypes
import logging
import os
import re
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

DRIVER = Path("/proc/driver/nvidia/version")
NEEDED_DISK_GB, NEEDED_SHARED_GB = 20, 1
CODECS = {"H.264": 4, "HEVC": 8, "VP9": 10, "AV1": 11}  # by NVDEC's codec number
HUB_TIMEOUT = 3  # seconds


@dataclass(frozen=True)
class Finding:
    """One result of a check. A failed one names a fix."""

    subject: str
    text: str
    fix: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.fix)

    def __str__(self) -> str:
        line = f"{'FAIL' if self.failed else 'ok':>4}  {self.subject:<12} {self.text}"
        return f"{line}\n      -> {self.fix}" if self.failed else line


def packages() -> Iterator[Finding]:
    """The installed versions match the requirements of pyproject.toml."""
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
    if wrong:
        yield Finding("packages", ", ".join(wrong), "pip install -e .")
    else:
        python = f"Python {sys.version.split()[0]}, flperf {version('flperf')}"
        yield Finding("packages", f"{python}, all as pinned")


def gpu() -> Iterator[Finding]:
    """The GPUs and their driver. No GPU fails the check only where there is an NVIDIA driver."""
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        note = f"torch is built for CUDA {built}, but finds no GPU" if built else "torch is a CPU build"
        fix = "there is an NVIDIA driver: reinstall torch from the public index, or update the driver"
        yield Finding("GPU", f"none, runs use the CPU ({note})", fix if DRIVER.exists() else "")
        return
    found = re.search(r"(\d+\.\d+[\d.]*)", DRIVER.read_text() if DRIVER.exists() else "")
    yield Finding("GPU", f"driver {found[1] if found else 'unknown'}, torch for CUDA {torch.version.cuda}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(
            "GPU", f"{index}: {device.name}, {device.total_memory / 1e9:.0f} GB, sm_{device.major}{device.minor}"
        )


def decoding() -> Iterator[Finding]:
    """PyAV and its decoders."""
    import av

    missing = [codec for codec in ("h264", "hevc", "vp9", "av1") if codec not in av.codecs_available]
    text = f"PyAV {av.__version__}" + (f", without {', '.join(missing)}" if missing else ", H.264, HEVC, VP9, AV1")
    yield Finding("decoding", text, "pip install --force-reinstall av" if missing else "")


def gpu_decoding() -> Iterator[Finding]:
    """DALI, and on a GPU the codecs that NVDEC decodes."""
    import nvidia.dali
    import torch

    text = f"DALI {nvidia.dali.__version__}"
    if torch.cuda.is_available():
        try:
            text += f", NVDEC: {', '.join(nvdec_codecs()) or 'none of ' + ', '.join(CODECS)}"
        except OSError:
            fix = (
                "start the container with NVIDIA_DRIVER_CAPABILITIES=all (or video,compute,utility), or use "
                "dataset.decoder=pyav"
            )
            yield Finding("decoding", f"{text}; NVDEC's library libnvcuvid.so.1 is missing", fix)
            return
    yield Finding("decoding", text)


def nvdec_codecs() -> list[str]:
    """The `CODECS` that the first GPU decodes at 4:2:0 and 8 bits. Raises `OSError` if the driver's library is
    missing."""
    import torch

    library = ctypes.CDLL("libnvcuvid.so.1")
    torch.zeros(1, device="cuda")  # creates the CUDA context that the library uses
    supported = []
    for name, number in CODECS.items():
        # CUVIDDECODECAPS: codec, chroma format (1: 4:2:0), bits above 8, 3 reserved, flags
        caps = (ctypes.c_uint32 * 32)(number, 1, 0)
        if library.cuvidGetDecoderCaps(caps) == 0 and bytes(caps)[24]:
            supported.append(name)
    return supported


def attention() -> Iterator[Finding]:
    """xFormers' available operators, and the one that the reference heads (width 128, bf16) use."""
    import torch

    logging.getLogger("xformers").setLevel("ERROR")  # it warns about extensions that flperf does not use
    from flperf.models.attention import attention_operator  # isort: skip  (it loads what xFormers' operators need)
    from xformers.ops import fmha  # isort: skip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    listed = ", ".join(operator.NAME for operator in fmha.ALL_FW_OPS if operator.is_available())
    yield Finding(
        "attention",
        f"{attention_operator(128, torch.bfloat16, device)}; xFormers {version('xformers')} has {listed or 'none'}",
    )


def compiler() -> Iterator[Finding]:
    """A compiler: torch.compile generates C++ on a CPU, and on a GPU Triton compiles its launcher in C."""
    import triton

    found = next((name for name in (os.environ.get("CXX"), "g++", "clang++") if name and shutil.which(name)), None)
    text = f"{shutil.which(found)}, Triton {triton.__version__}" if found else "no C++ compiler"
    yield Finding("compiler", text, "" if found else "apt install g++ (or engine.compile=false)")


def engine() -> Iterator[Finding]:
    """DeepSpeed's accelerator, its communication backend, and the compute dtype."""
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    from flperf.engine.process import compute_dtype

    accelerator = get_accelerator()
    device, backend = accelerator.device_name(), accelerator.communication_backend_name()
    text = f"DeepSpeed {deepspeed.__version__} on {device}"
    if torch.cuda.is_available() and device != "cuda":
        yield Finding("engine", f"{text}, although there is a GPU", "unset DS_ACCELERATOR")
        return
    if backend == "ccl":
        fix = "pip uninstall oneccl_bind_pt: flperf uses gloo on CPUs"
        yield Finding("engine", f"{text}, oneCCL bindings are installed", fix)
        return
    dtype = str(compute_dtype("auto", torch.device(device))).removeprefix("torch.")
    yield Finding("engine", f"{text}, {'nccl' if device == 'cuda' else 'gloo'}, {dtype}")


def space() -> Iterator[Finding]:
    """Free disk space in the working directory, and free shared memory."""
    for folder, needed, fix in (
        (".", NEEDED_DISK_GB, "set experiment=DIR to a larger disk, or lower checkpoint.keep"),
        ("/dev/shm", NEEDED_SHARED_GB, "start the container with --shm-size=8g or --ipc=host"),
    ):
        free = shutil.disk_usage(folder).free / 1e9
        yield Finding("space", f"{free:.0f} GB free in {Path(folder).resolve()}", fix if free < needed else "")


def tracking() -> Iterator[Finding]:
    """What W&B does in a run with the default settings."""
    from flperf.config import Tracking
    from flperf.training.dashboards import wandb_mode_and_project

    mode, _ = wandb_mode_and_project(Tracking())
    states = {
        "online": "logs online",
        "offline": "logs offline (`wandb login`, or later the `wandb sync` command that a run prints at its end)",
        "disabled": "disabled by WANDB_MODE or wandb's settings",
    }
    yield Finding("W&B", states.get(mode, mode))


def hub() -> Iterator[Finding]:
    """Access to the hub, the token, and the cached weights, which are all that a node without internet has."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        access = "offline (HF_HUB_OFFLINE)"
    else:
        token = "with a token" if get_token() else "without a token (`hf auth login`)"
        access = f"{reachable(constants.ENDPOINT)}, {token}"
    yield Finding("hub", f"{access}; in the cache: {', '.join(cached_weights()) or 'nothing'}")


def reachable(address: str) -> str:
    """ "online", or the reason why a server does not answer."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:  # an error status is an answer, too
        return "online"
    except OSError as error:
        return f"no answer from {address} ({getattr(error, 'reason', error)})"
    return "online"


def cached_weights() -> list[str]:
    """Names of the weights in the hub's local cache."""
    from huggingface_hub import constants

    return sorted(
        path.name.removeprefix("models--").replace("--", "/") for path in Path(constants.HF_HUB_CACHE).glob("models--*")
    )
