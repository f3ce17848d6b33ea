"""The kinds of datasets, and what is checked before anything is read."""

import pytest

from flperf.config import Config, Dataset, Source
from flperf.data import DATASETS, open_dataset, prepare_dataset
from flperf.data import Dataset as OpenDataset
from flperf.data.annotations import Annotations
from flperf.errors import UserError


def test_missing_files_are_named_before_a_backbone_is_fetched(tmp_path):
    """`prepare_dataset` is called first of all; of several missing files the first is named."""
    config = Config(
        dataset=Dataset(kind="kinetics_400", train=str(tmp_path / "train.csv"), validation="no.csv", labels="none.csv")
    )
    for name in ("train", "validation", "labels"):
        with pytest.raises(UserError, match=rf"dataset\.{name}: there is no file"):
            prepare_dataset(config)
        (tmp_path / f"{name}.csv").write_text("0 zero\n")
        setattr(config.dataset, name, str(tmp_path / f"{name}.csv"))
    prepare_dataset(config)
    with pytest.raises(UserError, match=r"dataset\.train: is not set"):
        open_dataset(Config(dataset=Dataset(kind="kinetics_400", validation="no.csv")), None, 0)


def test_kinds_are_looked_up():
    with pytest.raises(UserError, match="dataset.kind: 'kinetics' is none of kinetics_400, "):
        open_dataset(Config(dataset=Dataset(kind="kinetics")), None, 0)
    for kind in DATASETS.keys() - {"bouncing_shapes"}:
        with pytest.raises(UserError, match="dataset.train: "):
            open_dataset(Config(dataset=Dataset(kind=kind)), None, 0)


def write_csv(path, *rows) -> Source:
    path.write_text("".join(f"{row}\n" for row in rows))
    return Source(str(path), weight=2.0)


def videos_of(sources, **keys) -> Config:
    return Config(dataset=Dataset(kind="kinetics_400", sources=sources, **keys))


def test_sources_are_one_split_whose_clips_follow_one_another(tmp_path):
    sources = [write_csv(tmp_path / "a.csv", "x.mp4 0", "y.mp4 3"), write_csv(tmp_path / "b.csv", "y.mp4 3")]
    config = videos_of(sources, validation=sources[1].train)
    prepare_dataset(config)
    train = open_dataset(config, None, 0).splits["train"]
    assert train.paths == [str(tmp_path / name) for name in ("x.mp4", "y.mp4", "y.mp4")] and train.labels == [0, 3, 3]
    assert [(source.file, source.size, source.weight) for source in train.sources] == [
        (str(tmp_path / "a.csv"), 2, 2.0), (str(tmp_path / "b.csv"), 1, 2.0)
    ]  # fmt: skip
    limited = open_dataset(videos_of(sources, limit=1), None, 0).splits["train"]
    assert [source.size for source in limited.sources] == [1, 1]  # the limit is of each source


def test_the_classes_of_all_sources_need_a_name(tmp_path):
    sources = [write_csv(tmp_path / "a.csv", "x.mp4 0"), write_csv(tmp_path / "b.csv", "y.mp4 1")]
    labels = write_csv(tmp_path / "labels.csv", "0 running").train
    with pytest.raises(UserError, match="labels.csv: must name every class from 0 to 1"):
        open_dataset(videos_of(sources, labels=labels), None, 0)


@pytest.mark.parametrize("file", ["gone.csv", "", "."])
def test_a_source_that_is_no_file_is_named(tmp_path, file):
    config = videos_of([write_csv(tmp_path / "a.csv", "x.mp4 0"), Source(file)])
    for read in (prepare_dataset, lambda config: open_dataset(config, None, 0)):
        with pytest.raises(UserError, match=r"dataset\.sources\[1\]\.train: (there is no file|\. is a folder)"):
            read(config)
    config.dataset.kind, config.dataset.sources[0].train = "kinetics_400_cached", "gone"
    with pytest.raises(UserError, match=r"dataset\.sources\[0\]\.train: there is no file gone; point it to a manifest"):
        open_dataset(config, None, 0)


def test_a_kind_that_does_not_read_sources_is_not_trained_on(monkeypatch):
    """A kind that someone added, whose clips are its own."""
    splits = {"train": Annotations(["drawn"], [0]), "validation": Annotations([], [])}
    monkeypatch.setitem(DATASETS, "own", lambda *_: OpenDataset(splits, None, 0))
    open_dataset(Config(dataset=Dataset(kind="own")), None, 0)
    with pytest.raises(UserError, match="dataset.sources: dataset.kind 'own' does not read them"):
        open_dataset(Config(dataset=Dataset(kind="own", sources=[Source("a.csv")])), None, 0)
