"""`flperf encode`: resumable on any number of processes, and training from what it wrote."""

import json
import os
import shutil
import signal

import pytest
import torch
from ranks import encode as ranks
from runs import ROOT
from worlds import World, flperf, run_world

from flperf.config import load_config
from flperf.data import latent_shards, open_dataset
from flperf.data.shard_cache import open_shards
from flperf.engine.compile_cache import CACHE_VARIABLES
from flperf.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A configuration of the demo's videos for a tiny encoder, one of them broken; and of the latents that encoding
    it yields."""
    from flperf.data.demo import write_demo

    folder = tmp_path_factory.mktemp("encoding")
    write_demo(folder / "demo")
    (folder / "demo/videos/clip_03.mp4").write_bytes(b"no video")
    common = """
inherits: [{root}/configs/demo.yaml]
experiment: {folder}/experiment
backbone:
  architecture: {{crop_size: 32, hidden_size: 24, num_hidden_layers: 1, pred_hidden_size: 24,
   pred_num_hidden_layers: 1}}
dataset: {{n_frames: 8, validation: null, labels: null, train: {train}, kind: {kind}}}
model: {{num_context_latents: 2, hidden_dim: 32, depth: 1}}
trainer: {{batch_size: 4, max_steps: 6, warmup_steps: 1}}
latents: {{statistics_clips: 8}}
engine: {{compile: false, precision: fp32}}
tracking: {{log_every: 1}}
"""
    for name, kind, train in (
        ("video", "kinetics_400", "demo/train.csv"),
        ("cached", "kinetics_400_cached", "latents/train/manifest.csv"),
    ):
        (folder / f"{name}.yaml").write_text(common.format(root=ROOT, folder=folder, train=folder / train, kind=kind))
    return folder


def encode(folder, out, *overrides, as_files=False):
    """Encode in this process, with shards of eight clips as in `encoded`."""
    from flperf.commands.latent_writer import encode_dataset
    from flperf.engine.process import start_process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_shards, "SHARD_BYTES", ranks.SHARD_BYTES)
        encode_dataset(load_config(folder / "video.yaml", overrides), start_process(), folder / out, as_files=as_files)


@pytest.fixture(scope="module")
def encoded(demo):
    """Encoded by one process, which is killed after two shards, then by two; and the files that the first left."""
    arguments = ["--config", str(demo / "video.yaml"), "--out", str(demo / "latents")]
    with World(None, ranks.encode, arguments, 3) as world:
        assert world.join() == [-signal.SIGKILL], world.stderr
    left = sorted(path.name for path in (demo / "latents/train").glob("*.safetensors"))
    run_world(2, ranks.encode, arguments)
    return demo, left


def test_a_kill_loses_and_doubles_no_clip(encoded):
    folder, left = encoded
    assert len(left) == 2
    shards, annotations = open_shards(
        str(folder / "latents/train/manifest.csv"), load_config(folder / "cached.yaml"), None
    )
    videos = open_dataset(load_config(folder / "video.yaml"), _preprocessing(folder), 0).splits["train"]
    expected = [(path, label) for path, label in zip(videos.paths, videos.labels, strict=True) if "clip_03" not in path]
    assert list(zip(annotations.paths, annotations.labels, strict=True)) == expected


def test_cached_latents_are_the_encoders(encoded):
    from flperf.models.encoder import build_encoder, encode_clip
    from flperf.models.latents import latent_geometry

    folder, _ = encoded
    config = load_config(folder / "video.yaml")
    dataset = open_dataset(config, _preprocessing(folder), 0)
    encoder = build_encoder(config.backbone, _preprocessing(folder), dtype=torch.float32, device=CPU, compile=False)
    cache = open_dataset(load_config(folder / "cached.yaml"), None, 0)
    batch = next(dataset.chosen_batches([[0, 1, 2, 4]], 4, "train", CPU))
    latents = torch.cat(
        encode_clip(encoder, batch.video, latent_geometry(config, *encoder.latent_shape(8)), "split"), dim=1
    )
    cached = next(cache.chosen_batches([[0, 1, 2, 3]], 4, "train", CPU))  # clip 3 of the cache is row 4 of the CSV
    torch.testing.assert_close(cached.latents.float(), latents, rtol=2**-8, atol=1e-5)


def test_training_from_the_cache(encoded):
    folder, _ = encoded
    finished = flperf("train", "--config", str(folder / "cached.yaml"))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "experiment/cached/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6 and all(line["loss"] > 0 for line in lines)


def test_latents_of_others_are_not_gone_on_with(encoded):
    folder, _ = encoded
    rows = (folder / "demo/train.csv").read_text().splitlines()
    (folder / "reversed.csv").write_text("".join(f"demo/{row}\n" for row in reversed(rows)))
    before = (folder / "latents/train/manifest.csv").read_text()
    for other in (
        "dataset.stride=1",
        "dataset.limit=4",
        "dataset.start=first",
        f"dataset.train={folder / 'reversed.csv'}",
    ):
        with pytest.raises(
            UserError,
            match="another configuration or from other clips .*choose another --out or remove .*latents/train",
        ):
            encode(folder, "latents", other)
    encode(folder, "latents")  # what it was begun with still goes on
    assert (folder / "latents/train/manifest.csv").read_text() == before


def test_a_split_of_short_clips_alone_is_not_encoded(encoded):
    folder, _ = encoded
    with pytest.raises(UserError, match="95 of 96 clips are shorter than the window; set dataset.short_clips=pad"):
        encode(folder, "short", "dataset.fps=0.1", "dataset.short_clips=skip")


def test_a_shard_of_others_is_not_gone_on_with(encoded):
    """Copied into the folder, where it replaces one that is missing."""
    folder, _ = encoded
    for out in ("one", "other"):
        shutil.copytree(folder / "latents", folder / out)
    shards = [folder / out / "train/shard_00001.safetensors" for out in ("one", "other")]
    about = latent_shards.open_shard(shards[0]).identity
    latent_shards.write_shard(
        shards[0], torch.arange(8, 16), torch.ones(8, 4, 2, 2, 24).bfloat16(), about | {"clips": "others"}
    )
    with pytest.raises(UserError, match=r"shard_00001.safetensors: was encoded .*other clips \(clips: others -> \w+\)"):
        encode(folder, "one")
    shutil.copy(folder / "other/train/shard_00000.safetensors", shards[1])
    with pytest.raises(UserError, match="shard_00001.safetensors: holds other clips than rows"):
        encode(folder, "other")


def test_a_folder_of_the_other_format_is_refused(encoded):
    folder, _ = encoded
    before = (folder / "latents/train/manifest.csv").read_text()
    with pytest.raises(UserError, match="format: shards -> files.*choose another --out"):
        encode(folder, "latents", as_files=True)
    assert (folder / "latents/train/manifest.csv").read_text() == before


def test_out_must_be_a_folder_of_its_own(demo):
    (demo / "occupied").write_text("a file")
    for out in ("occupied", "occupied/below"):
        with pytest.raises(UserError, match="--out: .*occupied.* can't be made a folder"):
            encode(demo, out)
    (demo / "foreign/train").mkdir(parents=True)
    (demo / "foreign/train/manifest.csv").write_text("out_path,label\n")
    with pytest.raises(UserError, match="foreign/train: holds files, but no encoding.json"):
        encode(demo, "foreign", as_files=True)


def test_the_format_of_future_latents(demo):
    """Killed after five files, then started again with another batch size; then with what the folder does not hold."""
    limited, folder = "dataset.limit=9", demo / "files/train"
    arguments = ["--config", str(demo / "video.yaml"), "--out", str(demo / "files"), "--files", limited]
    with World(None, ranks.encode, arguments, 6) as world:
        assert world.join() == [-signal.SIGKILL], world.stderr
    assert len(list(folder.glob("clips/*.pt"))) == 5 and not (folder / "manifest.csv").exists()

    encode(demo, "files", limited, "evaluation.batch_size=3", as_files=True)
    assert [row.split(",")[0] for row in (folder / "manifest.csv").read_text().splitlines()] == [
        "out_path", *(f"clips/{clip:08d}.pt" for clip in range(9) if clip != 3)
    ]  # fmt: skip
    dataset = open_dataset(load_config(demo / "cached.yaml", [f"dataset.train={folder / 'manifest.csv'}"]), None, 0)
    assert dataset.latent_shape == (4, 2, 2, 24) and dataset.train_size == 8
    encode(demo, "whole", limited, as_files=True)
    for file in sorted(folder.glob("clips/*.pt")):
        torch.testing.assert_close(
            torch.load(file), torch.load(demo / "whole/train/clips" / file.name), rtol=2**-7, atol=1e-5
        )

    with pytest.raises(UserError, match="backbone.architecture.hidden_size: 24 -> 48"):
        encode(demo, "files", limited, "backbone.architecture.hidden_size=48", as_files=True)
    with pytest.raises(UserError, match="format: files -> shards"):
        encode(demo, "files", limited)


def test_encoding_uses_the_compile_cache_of_training(demo, monkeypatch):
    from flperf.commands import encode as command

    environment = {name: value for name, value in os.environ.items() if name not in CACHE_VARIABLES}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("flperf.engine.process.start_process", lambda: None)
    monkeypatch.setattr("flperf.commands.latent_writer.encode_dataset", lambda *_, **__: None)
    command.encode(["--config", str(demo / "video.yaml"), "--out", str(demo / "unused")])
    for variable, folder in CACHE_VARIABLES.items():
        assert environment[variable] == str(demo / "experiment/compile_cache" / folder)


def _preprocessing(folder):
    from flperf.data import Preprocessing

    return Preprocessing.of(load_config(folder / "video.yaml").backbone)
