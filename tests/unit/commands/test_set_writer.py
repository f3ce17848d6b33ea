"""`flperf prepare`: nothing is lost, doubled or silently left out. Kills are in tests/integration/test_prepare.py."""

import json
import os
import resource
import shutil
import signal

import pytest
import torch
from runs import TINY

from flperf.commands import set_writer
from flperf.commands.prepare import prepare as command
from flperf.commands.set_progress import read_records
from flperf.commands.set_writer import LOCK, prepare_set
from flperf.config import load_config
from flperf.data import Preprocessing, open_dataset
from flperf.data.annotations import read_annotations
from flperf.data.index import read_index
from flperf.data.preprocessing import BLOCK
from flperf.engine.process import start_process
from flperf.errors import UserError
from flperf.files import locked

CPU = torch.device("cpu")
GOOD = ("h264.mp4", "portrait.mp4", "with a space.mp4", "variable.mkv")
BROKEN = ("text.mp4", "empty.webm", "nowhere.mp4", "audio.mp4", "damaged.webm")


@pytest.fixture
def dataset(videos, tmp_path):
    """A configuration of two splits that share a file; and broken ones."""
    (tmp_path / "videos").mkdir()
    for name in (*GOOD, *BROKEN):
        if (videos / name).exists():
            shutil.copy(videos / name, tmp_path / "videos")
    train = [*GOOD[:3], *BROKEN]
    (tmp_path / "train.csv").write_text("".join(f"videos/{name} {k}\n" for k, name in enumerate(train)))
    (tmp_path / "validation.csv").write_text(f"videos/{GOOD[0]} 7\nvideos/{GOOD[3]} 0\n")
    (tmp_path / "config.yaml").write_text(TINY.format(folder=tmp_path))
    return tmp_path


def configured(folder, *overrides, train="train.csv", validation="validation.csv"):
    keys = {"kind": "kinetics_400", "train": folder / train, "validation": folder / validation, "stride": 1}
    names = [f"dataset.{key}={value}" for key, value in keys.items() if value != folder / "null"]
    return load_config(folder / "config.yaml", [*names, *overrides])


def prepare(folder, *overrides, out="prepared", short_side=None, **files):
    prepare_set(configured(folder, *overrides, **files), start_process(), folder / out, short_side)


def opened(folder, *overrides, **files):
    config = configured(folder, *overrides, **files)
    return open_dataset(config, Preprocessing.of(config.backbone), 0)


def written(folder):
    return {path: path.stat().st_mtime_ns for path in (folder / "prepared/clips").rglob("*.mp4")}


def test_a_set_is_named_like_any_other(dataset, capsys):
    prepare(dataset)
    printed = capsys.readouterr().out
    assert "train.csv: 3 of 8 clips, 5 can't be read" in printed and "validation.csv: 2 of 2 clips" in printed
    assert "GB before" in printed and "PSNR" in printed and "relative L2" in printed
    assert len(written(dataset)) == 4  # the file of both splits once
    prepared = opened(dataset, train="prepared/train.csv", validation="prepared/validation.csv")
    assert prepared.splits["train"].labels == [0, 1, 2] and prepared.splits["validation"].labels == [7, 0]
    rows = (dataset / "prepared/train.csv").read_text().splitlines()
    for name in BROKEN:
        row = next(row for row in rows if f"videos/{name}" in row)
        assert any(len(cell) > 10 for cell in row.split(",")[-2:]), row  # the reason
    for row in rows[1:]:
        width, height = map(int, row.split(",")[4:6])
        assert width % BLOCK == height % BLOCK == 0
    for split, clips in (("train", [0, 1, 2]), ("validation", [0, 1])):
        originals = next(opened(dataset).chosen_batches([clips], 3, split, CPU)).video
        found = next(prepared.chosen_batches([clips], 3, split, CPU)).video
        assert (originals.float().mean((1, 2, 3)) - found.float().mean((1, 2, 3))).abs().max() < 3


def test_what_it_says_is_what_it_costs(dataset):
    prepare(dataset, train="validation.csv")
    about = json.loads((dataset / "prepared/prepared.json").read_text())
    names = GOOD[0], GOOD[3]
    assert about["files"] == 2 and about["left_out"] == 0
    assert about["bytes_before"] == sum((dataset / "videos" / name).stat().st_size for name in names)
    assert about["bytes_after"] == sum(path.stat().st_size for path in written(dataset))
    originals, prepared = (
        next(opened(dataset, train=file, validation=file).chosen_batches([[0, 1]], 2, "validation", CPU)).video
        for file in ("validation.csv", "prepared/validation.csv")
    )
    difference = originals.double() - prepared.double()
    assert about["cost"]["pixels"] == pytest.approx(float(difference.abs().mean()))
    assert about["cost"]["psnr"] == pytest.approx(float(10 * torch.log10(255**2 / difference.square().mean())))
    assert 0 < about["cost"]["latents"] < 0.5 and 0.8 < about["cost"]["cosine"] < 1


def test_what_is_there_is_not_written_again(dataset):
    prepare(dataset)
    before, index = written(dataset), (dataset / "prepared/train.csv").read_text()
    prepare(dataset)
    assert written(dataset) == before and (dataset / "prepared/train.csv").read_text() == index


def test_what_changed_is_written_again(dataset):
    prepare(dataset)
    before = written(dataset)
    lost, cut = sorted(before)[:2]
    lost.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    shutil.copy(dataset / "videos/h264.mp4", dataset / "videos/text.mp4")  # was broken, and is mended
    prepare(dataset)
    after = written(dataset)
    assert {path for path in after if after[path] != before.get(path)} - {lost, cut} == after.keys() - before.keys()
    assert len(after) == 5 and cut.stat().st_mtime_ns != before[cut]
    assert len(read_index(str(dataset / "prepared/train.csv"), None)) == 4


def test_more_clips_are_added_and_none_lost(dataset):
    prepare(dataset, "dataset.limit=1")
    before = written(dataset)
    prepare(dataset)
    assert before.items() <= written(dataset).items() and len(written(dataset)) == 4
    with pytest.raises(UserError, match=r"holds \d clips that this dataset does not name .*choose another --out"):
        prepare(dataset, train="validation.csv")


def test_sources_have_an_index_each(dataset):
    (dataset / "other.csv").write_text("videos/variable.mkv 1\n")
    sources = f"dataset.sources=[{{train: {dataset}/train.csv}}, {{train: {dataset}/other.csv, weight: 2}}]"
    prepare(dataset, sources, "dataset.train=null")
    assert {path.name for path in (dataset / "prepared").glob("*.csv")} == {
        "train_0.csv",
        "train_1.csv",
        "validation.csv",
    }
    mixed = f"dataset.sources=[{{train: {dataset}/prepared/train_0.csv}}, {{train: {dataset}/other.csv}}]"
    batch = next(opened(dataset, mixed, "dataset.train=null").chosen_batches([range(4)], 4, "train", CPU))
    assert batch.valid.all()  # one prepared, one not


def test_originals_may_be_removed(dataset, capsys):
    prepare(dataset, train="validation.csv")
    about = json.loads((dataset / "prepared/prepared.json").read_text())
    before, index = written(dataset), (dataset / "prepared/train.csv").read_text()
    for name in GOOD:
        (dataset / "videos" / name).unlink()
    prepare(dataset, train="validation.csv")
    assert written(dataset) == before and (dataset / "prepared/train.csv").read_text() == index
    assert json.loads((dataset / "prepared/prepared.json").read_text()) == about
    assert "the originals are gone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "short_side", "match"),
    [
        (
            ["backbone.architecture.crop_size=64"],
            None,
            "in another way .crop: .*; resize: 36 -> 73.; choose another --out",
        ),
        ([], 80, "prepared in another way"),
        (["backbone.architecture.crop_size=64"], 50, "--short-side: .*at least 73"),
        (["dataset.kind=bouncing_shapes"], None, "dataset.kind: 'bouncing_shapes' has no video files"),
    ],
)
def test_another_preparation_is_refused(dataset, overrides, short_side, match):
    prepare(dataset)
    before, about = written(dataset), (dataset / "prepared/prepared.json").read_text()
    with pytest.raises(UserError, match=match):
        prepare(dataset, *overrides, short_side=short_side)
    assert written(dataset) == before and (dataset / "prepared/prepared.json").read_text() == about


def test_a_prepared_set_is_not_prepared_again(dataset):
    prepare(dataset)
    with pytest.raises(UserError, match="was prepared already; name the original files"):
        prepare(dataset, train="prepared/train.csv", validation="prepared/validation.csv", out="again")


def test_training_with_another_backbone_is_refused(dataset):
    prepare(dataset)
    with pytest.raises(UserError, match=r"^dataset\.train: .*train\.csv: was prepared for frames .*: prepare the orig"):
        opened(dataset, "backbone.architecture.crop_size=64", train="prepared/train.csv")
    with pytest.raises(UserError, match=r"^dataset\.validation: "):
        opened(dataset, "backbone.architecture.crop_size=64", validation="prepared/validation.csv")


def test_the_folder_is_its_own(dataset):
    (dataset / "occupied").write_text("a file")
    with pytest.raises(UserError, match="--out: .*occupied can't be made a folder"):
        prepare(dataset, out="occupied")
    with pytest.raises(UserError, match="videos holds files that `flperf prepare` did not write"):
        prepare(dataset, out="videos")
    (dataset / "prepared").mkdir()
    with locked(dataset / "prepared" / LOCK, "flperf prepare"), pytest.raises(UserError, match="another `flperf prep"):
        prepare(dataset)
    prepare(dataset)  # once the other has ended
    (dataset / "prepared/prepared.json").unlink()
    with pytest.raises(UserError, match=r"holds prepared files, but no prepared\.json"):
        prepare(dataset)


def test_a_full_disk_ends_it_and_it_resumes(dataset):
    """A limit of the size of files stands for the disk; the clips are larger than everything else."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4500, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: .*; fix that and start again") as error:
            prepare(dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(error.value) and not (dataset / "prepared/train.csv").exists()
    assert not list((dataset / "prepared").rglob("*.unfinished"))
    prepare(dataset)
    assert len(written(dataset)) == 4


def test_a_split_without_a_usable_file_is_an_error(dataset):
    (dataset / "broken.csv").write_text("".join(f"videos/{name} 0\n" for name in BROKEN))
    with pytest.raises(UserError, match=r"broken|train\.csv: none of its files can be read; its column 'error'"):
        prepare(dataset, train="broken.csv")


def test_odd_names_are_no_problem(dataset, videos):
    name = os.fsdecode(b"a \xff,\"'\n" + "ü".encode() + b"x" * 150 + b".mp4")
    shutil.copy(videos / "short.mp4", dataset / "videos" / name)
    listing = read_annotations(str(dataset / "validation.csv"), "--csv", None)
    splits = {"train": set_writer.Annotations([*listing.paths, str(dataset / "videos" / name)], [0, 1, 2])}
    (dataset / "prepared").mkdir()
    plan = set_writer.Plan(Preprocessing.of(configured(dataset).backbone))
    for _ in range(2):
        writer = set_writer.SetWriter(dataset / "prepared", plan, splits, start_process())
        writer.write(2)
    writer.write_indices(read_records(dataset / "prepared"))
    assert len(read_index(str(dataset / "prepared/train.csv"), None)) == 3


def test_options_are_checked_first(dataset):
    with pytest.raises(UserError, match="--short-side: must be at least 16"):
        command(["--config", str(dataset / "config.yaml"), "--out", str(dataset / "x"), "--short-side", "0"])
