"""Video files of a section: as they come, at a size that NVDEC's cache can hit, and prepared for fast decoding."""

import os
from dataclasses import dataclass
from pathlib import Path

from benchmarks import sizes
from benchmarks.video_files import VideoFormat, encode_videos
from flperf.config import Config
from flperf.data.preprocessing import Preprocessing
from flperf.data.samplers import FrameSampling
from flperf.data.videos import frame_sampling

FILES = 8  # of a kind; they are read again and again
FAST = {"preset": "faster", "tune": "fastdecode", "crf": "20", "g": "16", "bf": "1"}
FAST |= {"x264-params": "b-adapt=0:ref=1:partitions=none:threads=1"}  # as `flperf prepare` encodes


@dataclass(frozen=True)
class Kind:
    """Files of one kind, and the keys of a configuration that reads them."""

    video_format: VideoFormat
    keys: tuple[str, ...] = ()


def kinds() -> dict[str, Kind]:
    """By name. DALI decodes H.264 on a GPU only, so on a CPU the files are VP9."""
    if sizes.QUICK:
        vp9 = {"extension": "webm", "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
        codec = {} if sizes.ON_GPU else vp9
        shapes = {"original": VideoFormat(84, 64, **codec), "of 16s": VideoFormat(96, 64, **codec)}
        return {name: Kind(shape) for name, shape in shapes.items()} | {"prepared": prepared(32, codec)}
    options = {"crf": "23", "preset": "medium", "g": "250"}
    shapes = {"340 x 256": VideoFormat(340, 256, options=options), "352 x 256": VideoFormat(352, 256, options=options)}
    return {name: Kind(shape) for name, shape in shapes.items()} | {"prepared": prepared(256, {"options": FAST})}


def prepared(side: int, codec: dict) -> Kind:
    """Files of the very frames that the encoder sees, as `flperf prepare` writes them: nothing is resized."""
    size = [f"backbone.processor.size.{edge}={side}" for edge in ("height", "width")]
    return Kind(VideoFormat(side, side, **codec), tuple(size))


def write_kinds(folder: Path) -> dict[str, list[str]]:
    """The files of all kinds in a folder, written unless an earlier section has done so; returns their paths."""
    count, frames = (2, 24) if sizes.QUICK else (FILES, 300)
    folders = {name: folder / name.replace(" ", "_") for name in kinds()}
    if not (folder / "complete").exists():
        threads = len(os.sched_getaffinity(0))
        for name, kind in kinds().items():
            encode_videos(folders[name], count, frames, kind.video_format, threads)
        (folder / "complete").touch()
    return {name: sorted(map(str, folders[name].glob("[0-9]*.*"))) for name in folders}


def list_files(paths: list[str]) -> str:
    """Write the list of these files that `dataset.train` takes; returns its path."""
    file = Path(paths[0]).with_name("train.csv")
    file.write_text("".join(f"{path} 0\n" for path in paths))
    return str(file)


def video_configuration(regime: str, kind: str, paths: list[str], folder: Path, *overrides: str) -> Config:
    """A configuration that trains on files of a kind, at the size of a step."""
    keys = ["dataset.kind=kinetics_400", f"dataset.train={list_files(paths)}", "dataset.validation=null"]
    keys += ["dataset.labels=null", "dataset.stride=2", f"experiment={folder}", *kinds()[kind].keys]
    return sizes.configuration(regime, "vjepa2", *keys, *overrides, size=sizes.STEP_SIZE)


def reading_of(config: Config) -> tuple[FrameSampling, Preprocessing]:
    """How clips of a configuration are chosen and resized."""
    return frame_sampling(config.dataset, "train"), Preprocessing.of(config.backbone)
