"""Cached latents in the format of FutureLatents."""

import os

import pytest
import torch

from flperf.config import Config, Dataset, Source
from flperf.data import BatchShare, open_dataset
from flperf.data.latent_files import read_latents
from flperf.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def manifest(tmp_path):
    """Five files d t h w = 6 4 3 2 with a manifest; element values are all different."""
    rows = ["video,out_path,label"]
    for index in range(5):
        latents = torch.arange(6 * 4 * 3 * 2).reshape(6, 4, 3, 2) + 1000.0 * index
        torch.save(latents, tmp_path / f"clip {index}.pt")
        rows.append(f"v{index}.mp4,clip {index}.pt,{index % 2}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "manifest.csv"


def open_cache(manifest, **keys):
    return open_dataset(Config(dataset=Dataset(kind="kinetics_400_cached", train=str(manifest), **keys)), None, 0)


def test_latents_come_out_as_t_h_w_d(manifest):
    dataset = open_cache(manifest, validation=str(manifest))
    assert dataset.latent_shape == (4, 3, 2, 6) and (dataset.train_size, dataset.validation_size) == (5, 5)
    batches = list(dataset.validation_batches(BatchShare(0, 1, 2, 2), 2, None, CPU))
    assert [batch.valid.tolist() for batch in batches] == [[True, True], [True, True], [True, False]]
    latents, stored = batches[1].latents, torch.load(manifest.parent / "clip 3.pt")
    assert batches[1].video is None and latents.shape == (2, 4, 3, 2, 6) and latents.is_contiguous()
    assert torch.equal(latents[1], stored.permute(1, 2, 3, 0))
    assert batches[1].label.tolist() == [0, 1]


def test_training_sees_every_clip(manifest):
    batches = open_cache(manifest).train_batches(0, BatchShare(0, 1, 5, 5), CPU)
    assert sorted(next(batches).clip.tolist()) == list(range(5))
    batches.close()


def test_several_manifests_are_mixed(manifest):
    (manifest.parent / "more.csv").write_text("out_path\nclip 1.pt\n")
    sources = [Source(str(manifest)), Source(str(manifest.parent / "more.csv"))]
    config = Config(dataset=Dataset(kind="kinetics_400_cached", sources=sources))
    batch = next(open_dataset(config, None, 0).train_batches(0, BatchShare(0, 1, 64, 64), CPU))
    assert batch.clip.tolist().count(5) == 32
    assert torch.equal(batch.latents[batch.clip == 5][0], read_latents(str(manifest.parent / "clip 1.pt")))


def test_the_type_is_kept(manifest):
    for index in range(5):
        torch.save(torch.zeros(6, 4, 3, 2, dtype=torch.bfloat16), manifest.parent / f"clip {index}.pt")
    assert next(open_cache(manifest).train_batches(0, BatchShare(0, 1, 2, 2), CPU)).latents.dtype == torch.bfloat16


def test_no_validation_is_no_batch(manifest):
    assert list(open_cache(manifest).validation_batches(BatchShare(0, 1, 2, 2), 2, None, CPU)) == []


def test_a_missing_column_is_named(manifest):
    with pytest.raises(UserError, match="no column latents .*video, out_path, label"):
        open_cache(manifest, out_path_column="latents")


def test_a_missing_manifest_names_the_key():
    with pytest.raises(UserError, match="dataset.train: there is no file .*point it to a manifest"):
        open_cache("/no/such.csv")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",0", "row 3: needs a path under out_path"),
        ("a.pt,-1", "row 3: class index '-1' is negative"),
        ("a.pt,900000000", "row 3: class index 900000000 is above"),
        ("a.pt,0,1", "row 3: has 3 columns, the header has 2"),
        ("a.pt", "row 3: has 1 columns, the header has 2"),
    ],
)
def test_a_bad_row_of_a_manifest_is_named(manifest, row, message):
    manifest.write_text(f"out_path,label\nclip 0.pt,0\n{row}\n")
    with pytest.raises(UserError, match=f"manifest.csv: {message}"):
        open_cache(manifest)


def test_a_path_may_hold_bytes_that_are_not_utf8(manifest):
    name = os.path.join(os.fsencode(manifest.parent), b"caf\xe9.pt")
    os.rename(manifest.parent / "clip 0.pt", name)
    manifest.write_bytes(b"out_path,label\ncaf\xe9.pt,0\n")
    assert open_cache(manifest).latent_shape == (4, 3, 2, 6)
    os.remove(name)
    with pytest.raises(UserError, match="manifest.csv: row 2: is not UTF-8 text"):
        open_cache(manifest)


def test_an_empty_manifest_is_named(manifest):
    empty = manifest.with_name("empty.csv")
    empty.write_text("")
    with pytest.raises(UserError, match="empty.csv: holds no clips"):
        open_cache(empty, validation=str(manifest))


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "does not exist"),
        (b"no tensor", "is not a tensor that torch.load can read"),
        (torch.zeros(6, 4, 3), r"must be one tensor d t h w, not \[6, 4, 3\]"),
        (torch.zeros(6, 8, 3, 2), r"are \[8, 3, 2, 6\] .*but .*clip 0.pt is \[4, 3, 2, 6\]"),
        ({"latents": 1}, "must be one tensor"),
        (torch.zeros(6, 4, 3, 2, dtype=torch.int64), "must be fp32, bf16 or fp16, not torch.int64"),
        (torch.zeros(6, 4, 3, 2, dtype=torch.bool), "must be fp32, bf16 or fp16, not torch.bool"),
        (torch.zeros(6, 4, 3, 2, dtype=torch.complex64), "must be fp32, bf16 or fp16, not torch.complex64"),
        (torch.zeros(6, 4, 3, 2).index_fill_(0, torch.tensor(2), float("nan")), "hold NaN or infinity"),
        (torch.zeros(6, 4, 3, 2).index_fill_(2, torch.tensor(1), float("-inf")), "hold NaN or infinity"),
    ],
)
def test_a_bad_file_is_one_clear_line(manifest, content, message):
    file = manifest.parent / "clip 3.pt"
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises(UserError, match=f"clip 3.pt: .*{message}") as caught:
        next(open_cache(manifest).train_batches(0, BatchShare(0, 1, 5, 5), CPU))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_cut_anywhere_is_named(manifest, zipped):
    """What torch.load raises depends on where the file ends; some of its errors have no text."""
    file = manifest.parent / "clip 3.pt"
    torch.save(torch.zeros(6, 4, 3, 2), file, _use_new_zipfile_serialization=zipped)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 1, max(1, len(whole) // 60)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match="clip 3.pt: is not a tensor that torch.load can read: .") as caught:
            read_latents(str(file))
        assert "\n" not in str(caught.value)
