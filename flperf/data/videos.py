"""A dataset of video files: a Kinetics CSV or an index of one. Decoders are imported when batches are asked for, since
DALI alone takes a second to load."""

import operator
import os
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from torch import Tensor

from flperf.config import Config
from flperf.config import Dataset as DatasetConfig
from flperf.data.annotations import CLIPS_FILE, LABELS_FILE, Annotations, read_annotations, read_labels
from flperf.data.cores import reading_cores
from flperf.data.dataset import Dataset, load_with, read_splits, training_files
from flperf.data.loader import Reader
from flperf.data.prepared import check_set
from flperf.data.preprocessing import BLOCK, Preprocessing
from flperf.data.samplers import FrameSampling
from flperf.data.short_clips import ShortClips, choose_clips
from flperf.data.text_files import existing_file
from flperf.data.worker_messages import Reading
from flperf.data.workers import WorkerReader, start_server

NVDEC_LANES = 4  # clips that NVDEC decodes at a time, beside PyAV; an H100 has seven decoders, an A100 five


def open_videos(config: Config, preprocessing: Preprocessing, seed: int) -> Dataset:
    """The splits whose CSV files `config.dataset` names."""
    dataset = config.dataset
    windows = {split: frame_sampling(dataset, split) for split in ("train", "validation")}
    short: dict[str, ShortClips] = {}

    def read(file: str | None, key: str) -> Annotations:
        split = "validation" if key == "dataset.validation" else "train"
        name = str(file) if dataset.sources and split == "train" else split
        check_set(file, key, preprocessing)
        annotations, short[name] = choose_clips(_read_clips(file, key), windows[split], str(file), dataset.limit)
        return annotations

    splits = read_splits(dataset, read)
    read_labels(dataset.labels, list(splits.values()))  # raises if it is incomplete

    def open_split(split: str, device: torch.device, training: bool, threads: int) -> Reader:
        reading = Reading(windows[split], preprocessing, cores=frozenset(reading_cores(device)[1]))
        return open_reader(dataset.decoder, splits[split].paths, reading, device, training, threads)

    start_server()  # it takes some seconds, in which the encoder is built
    return Dataset(splits, load_with(open_split, splits, dataset), seed, frame_rate=_frame_rate, short=short)


def frame_sampling(dataset: DatasetConfig, split: str) -> FrameSampling:
    """The window of the clips of a split, "train" or "validation"."""
    start = dataset.start if split == "train" else dataset.validation_start
    return FrameSampling(dataset.n_frames, dataset.stride, start, dataset.fps, dataset.short_clips)


def check_files(dataset: DatasetConfig) -> None:
    """Raise `UserError` if a file of annotations does not exist."""
    for file, key in training_files(dataset):
        existing_file(file, key, CLIPS_FILE)
    for key, what in (("validation", CLIPS_FILE), ("labels", LABELS_FILE)):
        if getattr(dataset, key):
            existing_file(getattr(dataset, key), f"dataset.{key}", what)


def open_reader(
    decoder: str, paths: list[str], reading: Reading, device: torch.device, training: bool, threads: int
) -> Reader:
    """The reader of `dataset.decoder` for this many threads. "auto" is PyAV, and for training on a GPU both: which of
    them decodes a clip is then a matter of timing, on which no other result should depend."""
    if decoder == "dali" or (decoder == "auto" and device.type == "cuda" and training):
        from flperf.data.dali import DaliReader

        lanes = None if decoder == "dali" else nvdec_lanes(threads)
        return DaliReader(paths, reading, device, lanes)
    return WorkerReader(paths, reading, device)


def nvdec_lanes(threads: int) -> int:
    """How many of these threads NVDEC serves beside PyAV: at most half, since a lane keeps its core busy."""
    return min(NVDEC_LANES, threads // 2)


def describe_reading(decoder: str, device: torch.device, threads: int) -> str:
    """What reads which files in training, and why."""
    workers = f"PyAV in {threads} process{'es' * (threads > 1)}"
    if decoder == "dali":
        where = "NVDEC" if device.type == "cuda" else "a CPU"
        return f"DALI on {where} in {threads} threads (dataset.decoder=dali); {workers} for what it can't decode"
    if decoder == "auto" and device.type == "cuda" and nvdec_lanes(threads):
        return (
            f"{workers}; {nvdec_lanes(threads)} of them leave files that NVDEC decodes with a decoder at hand "
            f"(both sides multiples of {BLOCK}) to it, for as long as it is faster than a core"
        )
    return workers


def read_frames(path: str | bytes | os.PathLike, indices: Iterable[SupportsIndex], decoder: str = "pyav") -> Tensor:
    """Frames of a video file, uint8 `f h w c` (RGB), in the order of `indices`, which may repeat.

    Frame i is the i-th that decoding the file from start to end puts out, turned and mirrored as a player shows it.
    Training reads its clips in the same way. `decoder` is "pyav", or "dali", which decodes on the GPU if there is one
    and leaves to PyAV what it can't be relied on for; the result is on the CPU.

    Raises `BadClip` if one of the frames can't be decoded intact or the file is no video, `IndexError` for an index
    that the file does not have, `TypeError` for one that is no whole number.
    """
    from flperf.data.pyav import read_frames as with_pyav

    path, wanted = os.fsdecode(path), [operator.index(index) for index in indices]
    if decoder == "pyav":
        return with_pyav(path, wanted)
    if decoder != "dali":
        raise ValueError(f"decoder {decoder!r} is neither 'pyav' nor 'dali'")
    from flperf.data.dali import read_frames as with_dali

    return with_dali(path, wanted, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _read_clips(file: str | None, key: str) -> Annotations:
    if file is not None and os.path.isfile(file):
        from flperf.data import index

        if index.is_index(file):
            return index.read_index(file, None, key)
    return read_annotations(file, key, None)


def _frame_rate(path: str) -> float:
    from flperf.data.containers import frame_rate

    return frame_rate(path)
