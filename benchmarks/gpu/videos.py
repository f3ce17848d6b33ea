"""Video files of a section: as they come, at a size that NVDEC's cache can hit, and prepared for fast decoding."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks import sizes
from benchmarks.video_files import VideoFormat, encode_videos
from flperf.config import Config
from flperf.data.clip_writer import Plan, write_clip
from flperf.data.preprocessing import Preprocessing
from flperf.data.pyav import opened
from flperf.data.samplers import FrameSampling
from flperf.data.videos import frame_sampling

FILES = 8  # of a kind; they are read again and again
PREPARED = "prepared"  # from the files of the first kind


def formats() -> dict[str, VideoFormat]:
    """Of the kinds of files that are not prepared, by name. DALI decodes H.264 on a GPU only, so on a CPU they are
    VP9."""
    if sizes.QUICK:
        vp9 = {"extension": "webm", "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}}
        codec = {} if sizes.ON_GPU else vp9
        return {"original": VideoFormat(84, 64, **codec), "of 16s": VideoFormat(96, 64, **codec)}
    options = {"crf": "23", "preset": "medium", "g": "250"}
    return {"340 x 256": VideoFormat(340, 256, options=options), "352 x 256": VideoFormat(352, 256, options=options)}


def write_kinds(folder: Path) -> dict[str, list[str]]:
    """The files of all kinds in a folder, written unless an earlier section has done so; returns their paths."""
    count, frames = (2, 24) if sizes.QUICK else (FILES, 300)
    folders = {name: folder / name.replace(" ", "_") for name in (*formats(), PREPARED)}
    if not (folder / "complete").exists():
        threads = len(os.sched_getaffinity(0))
        for name, video_format in formats().items():
            encode_videos(folders[name], count, frames, video_format, threads)
        prepare(sorted(next(iter(folders.values())).iterdir()), folders[PREPARED], threads)
        (folder / "complete").touch()
    return {name: sorted(map(str, folders[name].glob("[0-9]*.*"))) for name in folders}


def prepare(files: list[Path], folder: Path, threads: int) -> None:
    """Write files as `flperf prepare` does: the frames that the encoder of a step sees."""
    folder.mkdir()
    plan = Plan(Preprocessing.of(sizes.configuration(size=sizes.STEP_SIZE).backbone))

    def write(path: Path) -> None:
        with opened(str(path)) as file:
            write_clip(file, folder / f"{path.stem}.mp4", plan)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, files))


def list_files(paths: list[str]) -> str:
    """Write the list of these files that `dataset.train` takes; returns its path."""
    file = Path(paths[0]).with_name("train.csv")
    file.write_text("".join(f"{path} 0\n" for path in paths))
    return str(file)


def video_configuration(regime: str, paths: list[str], folder: Path, *overrides: str) -> Config:
    """A configuration that trains on these files, at the size of a step."""
    keys = ["dataset.kind=kinetics_400", f"dataset.train={list_files(paths)}", "dataset.validation=null"]
    keys += ["dataset.labels=null", "dataset.stride=2", f"experiment={folder}"]
    return sizes.configuration(regime, "vjepa2", *keys, *overrides, size=sizes.STEP_SIZE)


def reading_of(config: Config) -> tuple[FrameSampling, Preprocessing]:
    """How clips of a configuration are chosen and resized."""
    return frame_sampling(config.dataset, "train"), Preprocessing.of(config.backbone)
