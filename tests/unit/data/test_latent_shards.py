"""Cached latents in shards: written completely or not at all, read bit for bit, and refused if they do not fit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flperf.config import Config, Dataset, Model, Source
from flperf.data import BatchShare, latent_shards, open_dataset
from flperf.data.annotations import Annotations
from flperf.data.samplers import ValidationSampler
from flperf.data.shard_cache import ShardReader, open_shards
from flperf.errors import UserError

CPU = torch.device("cpu")
SHAPE = (4, 3, 2, 6)


def configuration(folder, **dataset) -> Config:
    train = str(folder / latent_shards.MANIFEST)
    return Config(
        dataset=Dataset(kind="kinetics_400_cached", train=train, n_frames=8, **dataset),
        model=Model(num_context_latents=2),
    )


def write_cache(folder, seed: int, scale: float = 1.0, **more) -> torch.Tensor:
    """Write seven clips in shards of three; returns their latents. `more` is added to what describes the encoding."""
    latents = scale * torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    about = latent_shards.identity(configuration(folder), 2, 2) | more
    folder.mkdir(exist_ok=True)
    for number in range(3):
        clips = torch.arange(7)[3 * number : 3 * number + 3]
        latent_shards.write_shard(latent_shards.shard_path(folder, number), clips, latents[clips], about)
    annotations = Annotations([f"video {clip}.mp4" for clip in range(7)], [clip % 3 for clip in range(7)])
    assert latent_shards.write_manifest(folder, annotations, 3) == 7
    return latents


@pytest.fixture
def cache(tmp_path):
    """The folder of a cache of seven clips, and the latents."""
    return tmp_path, write_cache(tmp_path, seed=0)


@pytest.fixture
def two_caches(tmp_path):
    """A configuration that mixes two caches of other clips, and the latents of both."""
    latents = [
        write_cache(tmp_path / name, seed, scale, clips=name)
        for seed, (name, scale) in enumerate((("first", 1.0), ("second", 5.0)))
    ]
    sources = [Source(str(tmp_path / name / "manifest.csv"), w) for name, w in (("first", 1.0), ("second", 3.0))]
    return replace(
        configuration(tmp_path), dataset=Dataset("kinetics_400_cached", sources=sources, n_frames=8)
    ), latents


def test_batches_are_the_latents_that_were_written(cache):
    folder, latents = cache
    dataset = open_dataset(configuration(folder), None, 0)
    assert dataset.latent_shape == SHAPE and dataset.splits["train"].labels == [0, 1, 2, 0, 1, 2, 0]
    batch = next(dataset.train_batches(0, BatchShare(0, 1, 7, 7), CPU))
    assert sorted(batch.clip.tolist()) == list(range(7)) and batch.latents.dtype == torch.bfloat16
    assert torch.equal(batch.latents, latents[batch.clip])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, [5609389484861387776, 5599401529871770112]),
        (torch.bfloat16, [-6440963336321422846, -6383961208989177425]),
    ],
)
def test_checksums_stay_those_of_existing_caches(dtype, expected):
    latents = (torch.arange(48).view(2, 24) * 2_654_435_761 % 65_521 - 30_000.0).to(dtype)
    assert [latent_shards.checksum(latent_shards.raw_bytes(row)) for row in latents] == expected


def open_reader(folder):
    shards, _ = open_shards(str(folder / latent_shards.MANIFEST), configuration(folder), None)
    return ShardReader(shards)


def read(reader, clip):
    out = torch.empty(reader.shape, dtype=reader.dtype)
    reader.read(ValidationSampler(7).request(clip), out)
    return out


def test_statistics_are_those_of_all_clips(cache):
    folder, latents = cache
    mean, std = open_dataset(configuration(folder), None, 0).channel_statistics
    tokens = latents.double().flatten(0, 3)
    torch.testing.assert_close(mean, tokens.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std, tokens.std(0, correction=0), rtol=1e-5, atol=0)


def test_sources_are_read_one_after_another(two_caches):
    config, latents = two_caches
    dataset = open_dataset(config, None, 0)
    batch = next(dataset.train_batches(0, BatchShare(0, 1, 64, 64), CPU))
    assert torch.equal(batch.latents, torch.cat(latents)[batch.clip])
    assert int((batch.clip >= 7).sum()) == 48 and batch.label.tolist() == [clip % 7 % 3 for clip in batch.clip.tolist()]


def test_statistics_are_those_of_the_mixture(two_caches):
    """The second source is read three times as often, so each of its clips counts three times."""
    config, (first, second) = two_caches
    mean, std = open_dataset(config, None, 0).channel_statistics
    tokens = torch.cat([first, second, second, second]).double().flatten(0, 3)
    torch.testing.assert_close(mean, tokens.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std, tokens.std(0, correction=0), rtol=1e-5, atol=0)


def test_sources_of_another_encoding_or_format_are_refused(two_caches, tmp_path):
    config, _ = two_caches
    about = latent_shards.identity(configuration(tmp_path), 2, 2) | {"clips": "second"}
    for number in range(3):
        shard = latent_shards.shard_path(tmp_path / "second", number)
        clips = latent_shards.open_shard(shard).clips
        latent_shards.write_shard(shard, clips, torch.randn(len(clips), 4, 3, 1, 6, dtype=torch.float32), about)
    with pytest.raises(UserError, match="second/shard_00000.safetensors: was encoded differently from .*first/shard_0"):
        open_dataset(config, None, 0)
    (tmp_path / "files.csv").write_text("out_path,label\nclips/0.pt,0\n")
    for sources in (["first/manifest.csv", "files.csv"], ["files.csv", "first/manifest.csv"]):
        config.dataset.sources = [Source(str(tmp_path / name)) for name in sources]
        with pytest.raises(UserError, match="files.csv: is not a manifest of shards .*; encode all .* in one format"):
            open_dataset(config, None, 0)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_is_named(cache, bit):
    folder, latents = cache
    reader, path = open_reader(folder), latent_shards.shard_path(folder, 1)
    content = bytearray(path.read_bytes())
    row_bytes = latent_shards.row_bytes(SHAPE, torch.bfloat16)
    content[latent_shards.open_shard(path).offset + row_bytes + 100] ^= 1 << bit  # in row 1 of shard 1: clip 4
    path.write_bytes(content)
    assert torch.equal(read(reader, 3), latents[3])
    with pytest.raises(UserError, match="shard_00001.safetensors: row 1: does not have the checksum"):
        read(reader, 4)


def test_a_shard_cut_short_or_removed_is_named(cache):
    reader, path = open_reader(cache[0]), latent_shards.shard_path(cache[0], 2)
    path.write_bytes(path.read_bytes()[: latent_shards.open_shard(path).offset + 10])
    with pytest.raises(UserError, match="shard_00002.safetensors: row 0: the file is cut short"):
        read(reader, 6)
    path.unlink()
    with pytest.raises(UserError, match="was removed while it was read"):
        read(reader, 6)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("backbone", "encode", "joint"), ("backbone", "weights", "facebook/vjepa2-vitl-fpc64-256"), ("dataset",
    "n_frames", 16),
     ("dataset", "stride", 4), ("dataset", "fps", 12.5), ("model", "num_context_latents", 1),
     ("backbone", "frame_stride", 2)],
)  # fmt: skip
def test_latents_of_another_encoding_are_refused(cache, section, key, value):
    config = configuration(cache[0])
    setattr(getattr(config, section), key, value)
    with pytest.raises(UserError, match=f"encoded with another configuration .*{key}"):
        open_dataset(config, None, 0)


def test_the_rate_of_a_cache_is_that_of_the_configuration(cache):
    """An older cache has no rate and counts as one at a stride. Beside a rate, the stride has no effect."""
    folder, _ = cache
    for number in range(3):
        path = latent_shards.shard_path(folder, number)
        about = latent_shards.open_shard(path).identity
        del about["dataset"]["fps"]
        rewrite(path, about)
    assert open_dataset(configuration(folder), None, 0).train_size == 7
    with pytest.raises(UserError, match=r"\(dataset.fps: None -> 12.5; dataset.stride: 2 -> None\): encode again"):
        open_dataset(configuration(folder, fps=12.5), None, 0)
    for number in range(3):
        rewrite(latent_shards.shard_path(folder, number), latent_shards.identity(configuration(folder, fps=12.5), 2, 2))
    for stride in (2, 7):
        assert open_dataset(configuration(folder, fps=12.5, stride=stride), None, 0).train_size == 7
    for fps in (None, 25.0):
        with pytest.raises(UserError, match="encoded with another configuration .*dataset.fps: 12.5 -> "):
            open_dataset(configuration(folder, fps=fps), None, 0)


def rewrite(path, about=None, **tensors):
    """Write a shard again with other tensors (without those that are None) or another identity."""
    kept = {name: tensor for name, tensor in (load_file(path) | tensors).items() if tensor is not None}
    about = latent_shards.open_shard(path).identity if about is None else about
    save_file(kept, path, metadata={"identity": json.dumps(about)})


DAMAGES = {
    "nothing": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"nothing of the kind" * 100),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "fp16": lambda path: rewrite(path, latents=load_file(path)["latents"].half()),
    "flat": lambda path: rewrite(path, latents=load_file(path)["latents"].flatten(1)),
    "no checksums": lambda path: rewrite(path, checksum=None),
    "no metadata": lambda path: save_file(load_file(path), path),
    "empty identity": lambda path: rewrite(path, about={}),
    "a list": lambda path: rewrite(path, about=[]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named(cache, damage):
    folder, _ = cache
    DAMAGES[damage](latent_shards.shard_path(folder, 1))
    with pytest.raises(UserError, match="shard_00001.safetensors: is not a shard of cached latents") as caught:
        open_dataset(configuration(folder), None, 0)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(cache):
    latent_shards.shard_path(cache[0], 1).unlink()
    with pytest.raises(UserError, match="shard_00001.safetensors: does not exist"):
        open_dataset(configuration(cache[0]), None, 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "more"),
    [
        ((4, 2, 2, 6), torch.bfloat16, {}),
        (SHAPE, torch.float32, {}),
        (SHAPE, torch.bfloat16, {"clips": "of another dataset"}),
    ],
)
def test_a_mixed_cache_is_refused(cache, shape, dtype, more):
    folder, _ = cache
    about = latent_shards.identity(configuration(folder), 2, 2) | more
    latent_shards.write_shard(
        latent_shards.shard_path(folder, 1), torch.arange(3, 6), torch.randn(3, *shape).to(dtype), about
    )
    with pytest.raises(UserError, match="shard_00001.safetensors: was encoded differently from shard_00000.safetens"):
        open_dataset(configuration(folder), None, 0)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_latents_that_are_not_finite_are_named(cache, value):
    folder, latents = cache
    clips = latents[3:6].clone()
    clips[1, 2, 1, 0, 3] = float(value)
    latent_shards.write_shard(
        latent_shards.shard_path(folder, 1),
        torch.arange(3, 6),
        clips,
        latent_shards.identity(configuration(folder), 2, 2),
    )
    with pytest.raises(UserError, match="shard_00001.safetensors: row 1: its latents hold NaN or infinity"):
        open_dataset(configuration(folder), None, 0)


@pytest.mark.parametrize(
    ("row", "message"),
    [("video 2.mp4,2,0", "row 4: expected path,label,shard,row"), ("video 2.mp4,-1,0,2",
    "row 4: expected path,label,shard,row"),
     ("video 2.mp4,2,0,x", "row 4: expected path,label,shard,row"),
     ("video 2.mp4,2,0,3", "row 4: names row 3 of shard_00000.*, which has 3")],
)  # fmt: skip
def test_a_bad_row_of_the_manifest_is_named(cache, row, message):
    manifest = cache[0] / latent_shards.MANIFEST
    lines = manifest.read_text().splitlines()
    assert lines[3] == "video 2.mp4,2,0,2"
    manifest.write_text("\n".join([*lines[:3], row, *lines[4:]]) + "\n")
    with pytest.raises(UserError, match=f"manifest.csv: {message}"):
        open_dataset(configuration(cache[0]), None, 0)


def test_both_splits_must_be_shards(cache):
    folder, _ = cache
    with pytest.raises(UserError, match="dataset.validation: there is no file .*gone.csv; point it to the manifest"):
        open_dataset(configuration(folder, validation=str(folder / "gone.csv")), None, 0)
    (folder / "files.csv").write_text("out_path,label\nclips/0.pt,0\n")
    with pytest.raises(UserError, match="files.csv: is not a manifest of shards"):
        open_dataset(configuration(folder, validation=str(folder / "files.csv")), None, 0)


def test_the_manifest_is_not_written_over_the_wrong_shards(cache):
    folder, _ = cache
    annotations = Annotations([f"video {clip}.mp4" for clip in range(7)], [0] * 7)
    before = (folder / latent_shards.MANIFEST).read_text()
    shutil.copy(latent_shards.shard_path(folder, 1), latent_shards.shard_path(folder, 0))
    with pytest.raises(UserError, match="shard_00000.safetensors: holds other clips than rows 0 to 2 of the dataset"):
        latent_shards.write_manifest(folder, annotations, 3)
    assert (folder / latent_shards.MANIFEST).read_text() == before


def test_a_manifest_keeps_names_that_are_not_utf8(cache):
    folder, _ = cache
    annotations = Annotations([f"caf\udce9 {clip}.mp4" for clip in range(7)], [0] * 7)
    latent_shards.write_manifest(folder, annotations, 3)
    _, read = open_shards(str(folder / latent_shards.MANIFEST), configuration(folder), None)
    assert read.paths and set(read.paths) <= set(annotations.paths)
