"""Cached latents in shards: written whole or not at all, read back bit for bit, and refused where they don't fit."""

import pytest
import torch

from flperf.config import Config, Dataset, Model, UserError
from flperf.data import Place, latent_shards, open_dataset
from flperf.data.clips import Annotations

CPU = torch.device("cpu")
SHAPE = (4, 3, 2, 6)


def configuration(folder, **dataset) -> Config:
    train = str(folder / latent_shards.MANIFEST)
    return Config(dataset=Dataset(kind="kinetics_400_cached", train=train, n_frames=8, **dataset), model=Model(num_context_latents=2))


@pytest.fixture
def cache(tmp_path):
    """Seven clips in shards of three; returns the folder and the latents."""
    latents = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    about = latent_shards.identity(configuration(tmp_path), 2, 2)
    for number in range(3):
        clips = torch.arange(7)[3 * number : 3 * number + 3]
        latent_shards.write_shard(latent_shards.shard_path(tmp_path, number), clips, latents[clips], about)
    annotations = Annotations([f"video {clip}.mp4" for clip in range(7)], [clip % 3 for clip in range(7)])
    assert latent_shards.write_manifest(tmp_path, annotations, 3) == 7
    return tmp_path, latents


def test_batches_are_the_latents_that_were_written(cache):
    folder, latents = cache
    dataset = open_dataset(configuration(folder), None, 0)
    assert dataset.latent_shape == SHAPE and dataset.splits["train"].labels == [0, 1, 2, 0, 1, 2, 0]
    batch = next(dataset.train_batches(0, Place(0, 1, 7, 7), CPU))
    assert sorted(batch.clip.tolist()) == list(range(7)) and batch.latents.dtype == torch.bfloat16
    assert torch.equal(batch.latents, latents[batch.clip])


def test_statistics_are_those_of_all_clips(cache):
    folder, latents = cache
    mean, std = open_dataset(configuration(folder), None, 0).channel_statistics
    tokens = latents.double().flatten(0, 3)
    torch.testing.assert_close(mean, tokens.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std, tokens.std(0, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_is_named(cache, bit):
    folder, _ = cache
    shards, _ = latent_shards.open_shards(str(folder / latent_shards.MANIFEST), configuration(folder), None)
    path = latent_shards.shard_path(folder, 1)
    content = bytearray(path.read_bytes())
    content[shards.offsets[path] + shards.row_bytes + 100] ^= 1 << bit  # in row 1 of shard 1: clip 4
    path.write_bytes(content)
    out = torch.empty(SHAPE, dtype=torch.bfloat16)
    latent_shards.read_row(shards, 3, out)
    with pytest.raises(UserError, match="shard_00001.safetensors: row 1: does not have the checksum"):
        latent_shards.read_row(shards, 4, out)


def test_a_shard_cut_short_or_gone_is_named(cache):
    folder, _ = cache
    shards, _ = latent_shards.open_shards(str(folder / latent_shards.MANIFEST), configuration(folder), None)
    path, out = latent_shards.shard_path(folder, 2), torch.empty(SHAPE, dtype=torch.bfloat16)
    path.write_bytes(path.read_bytes()[: shards.offsets[path] + 10])
    with pytest.raises(UserError, match="shard_00002.safetensors: row 0: the file is cut short"):
        latent_shards.read_row(shards, 6, out)
    path.unlink()
    with pytest.raises(UserError, match="there is no such shard"):
        latent_shards.read_row(shards, 6, out)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("backbone", "encode", "joint"), ("backbone", "weights", "facebook/vjepa2-vitl-fpc64-256"), ("dataset", "n_frames", 16),
     ("dataset", "stride", 4), ("model", "num_context_latents", 1), ("backbone", "frame_stride", 2)],
)  # fmt: skip
def test_latents_of_another_encoding_are_refused(cache, section, key, value):
    config = configuration(cache[0])
    setattr(getattr(config, section), key, value)
    with pytest.raises(UserError, match=f"encoded otherwise than configured .*{key}"):
        open_dataset(config, None, 0)


def test_what_is_no_shard_is_refused(cache):
    folder, _ = cache
    latent_shards.shard_path(folder, 0).write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="shard_00000.safetensors: is no shard of cached latents"):
        open_dataset(configuration(folder), None, 0)
