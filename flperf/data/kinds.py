"""The kinds of datasets: `open_dataset` looks up `dataset.kind` in `DATASETS`."""

from collections.abc import Callable
from pathlib import Path

from flperf.config import Config
from flperf.config import Dataset as DatasetConfig
from flperf.data.bouncing_shapes import open_shapes
from flperf.data.dataset import Dataset, training_files
from flperf.data.latent_files import open_file_dataset
from flperf.data.latent_shards import is_shards
from flperf.data.preprocessing import Preprocessing
from flperf.data.shard_cache import open_shard_dataset
from flperf.data.videos import check_files, open_videos
from flperf.errors import UserError


def open_dataset(config: Config, preprocessing: Preprocessing | None, seed: int) -> Dataset:
    """Read the annotations that `config.dataset` names. `preprocessing` is the backbone's; cached latents need none.

    Raises `UserError` with one line that names the key or the row.
    """
    kind = config.dataset.kind
    if kind not in DATASETS:
        raise UserError(f"dataset.kind: {kind!r} is none of {', '.join(DATASETS)}")
    dataset = DATASETS[kind](config, preprocessing, seed)
    if config.dataset.sources and not dataset.splits["train"].sources:
        raise UserError(f"dataset.sources: dataset.kind {kind!r} does not read them; set it to null")
    return dataset


def prepare_dataset(config: Config) -> None:
    """Write the demo's folder if it does not exist. Call it on one process of each machine while the others wait.

    Raises `UserError` if a file of annotations is missing, before a backbone is downloaded from a hub.
    """
    dataset = config.dataset
    if dataset.kind == "demo" and not Path(_demo_csv(dataset)).is_file():
        from flperf.data.demo import write_demo

        write_demo(Path(_demo_csv(dataset)).parent)
    if dataset.kind in ("kinetics_400", "demo"):
        check_files(dataset)


def _open_demo(config: Config, preprocessing: Preprocessing, seed: int) -> Dataset:
    _demo_csv(config.dataset)
    return open_videos(config, preprocessing, seed)


def _open_cached(config: Config, preprocessing: None, seed: int) -> Dataset:
    """Shards that `flperf encode` wrote, or FutureLatents' files, by the header of the manifest."""
    in_shards = any(is_shards(file) for file, _ in training_files(config.dataset))
    return (open_shard_dataset if in_shards else open_file_dataset)(config, seed)


def _demo_csv(dataset: DatasetConfig) -> str:
    if not dataset.train or Path(dataset.train).name != "train.csv":
        raise UserError(
            "dataset.train: for the demo, name train.csv in the folder to be written, such as data/demo/train.csv"
        )
    return dataset.train


DATASETS: dict[str, Callable[..., Dataset]] = {
    "kinetics_400": open_videos,
    "kinetics_400_cached": _open_cached,
    "bouncing_shapes": open_shapes,
    "demo": _open_demo,
}

WITHOUT_VIDEO = {"kinetics_400_cached"}  # kinds that hold latents and need neither preprocessing nor an encoder
