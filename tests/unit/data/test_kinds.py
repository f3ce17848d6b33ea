"""The kinds of datasets, and what is checked before anything is read."""

import pytest

from flperf.config import Config, Dataset
from flperf.data import DATASETS, open_dataset, prepare_dataset
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
