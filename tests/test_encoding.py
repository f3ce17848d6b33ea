"""`flperf encode`: resumable on any number of processes, and training from what it wrote."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import ROOT, launch

from flperf.config import load_config
from flperf.data import latent_shards, open_dataset

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A configuration of the demo's videos for a tiny encoder, one of them broken; and of the latents that encoding it yields."""
    from flperf.data.demo import write_demo

    folder = tmp_path_factory.mktemp("encoding")
    write_demo(folder / "demo")
    (folder / "demo/videos/clip_03.mp4").write_bytes(b"no video")
    common = """
inherits: [{root}/configs/demo.yaml]
experiment: {folder}/experiment
backbone: {{architecture: {{crop_size: 32, hidden_size: 24, num_hidden_layers: 1}}}}
dataset: {{n_frames: 8, validation: null, labels: null, train: {train}, kind: {kind}}}
model: {{num_context_latents: 2, hidden_dim: 32, depth: 1}}
trainer: {{batch_size: 4, max_steps: 6, warmup_steps: 1}}
latents: {{statistics_clips: 8}}
engine: {{compile: false, precision: fp32}}
tracking: {{log_every: 1}}
"""
    for name, kind, train in (("video", "kinetics_400", "demo/train.csv"), ("cached", "kinetics_400_cached", "latents/train/manifest.csv")):
        (folder / f"{name}.yaml").write_text(common.format(root=ROOT, folder=folder, train=folder / train, kind=kind))
    return folder


def encode(folder, out, *more, **environment):
    command = [sys.executable, "-m", "flperf.encode", "--config", str(folder / "video.yaml"), "--out", str(folder / out), *more]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600, check=False)


@pytest.fixture(scope="module")
def encoded(demo):
    """Two processes, killed once in the middle, then started again."""
    command = [str(ROOT / "flperf/encode.py"), "--config", str(demo / "video.yaml"), "--out", str(demo / "latents")]
    small = {"FLPERF_TEST_SHARD_BYTES": str(8 * 4 * 2 * 2 * 24 * 2)}  # eight clips a shard
    site = demo / "site"
    site.mkdir()
    # Shards of the trainer's size would hold the whole demo: make them small, in the processes that encode.
    (site / "sitecustomize.py").write_text(
        "import os, flperf.data.latent_shards as s; s.SHARD_BYTES = int(os.environ['FLPERF_TEST_SHARD_BYTES'])"
    )
    environment = {**os.environ, **small, "PYTHONPATH": str(site)}
    first = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while len(list((demo / "latents").glob("train/*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    left = sorted(path.name for path in (demo / "latents/train").glob("*.safetensors"))
    finished = launch(2, *command, **small, PYTHONPATH=str(site))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    return demo, left


def test_a_kill_loses_and_doubles_no_clip(encoded):
    folder, left = encoded
    assert 2 <= len(left) < 12, "the first start was to be killed in between"
    shards, annotations = latent_shards.open_shards(str(folder / "latents/train/manifest.csv"), load_config(folder / "cached.yaml"), None)
    videos = open_dataset(load_config(folder / "video.yaml"), _preprocessing(folder), 0).splits["train"]
    expected = [(path, label) for path, label in zip(videos.paths, videos.labels, strict=True) if "clip_03" not in path]
    assert list(zip(annotations.paths, annotations.labels, strict=True)) == expected


def test_cached_latents_are_the_encoders(encoded):
    from flperf.encoder import build_encoder, encode_clip
    from flperf.latents import latent_layout

    folder, _ = encoded
    config = load_config(folder / "video.yaml")
    dataset = open_dataset(config, _preprocessing(folder), 0)
    encoder = build_encoder(config.backbone, _preprocessing(folder), dtype=torch.float32, device=CPU, compile=False)
    shards, _ = latent_shards.open_shards(str(folder / "latents/train/manifest.csv"), load_config(folder / "cached.yaml"), None)
    batch = next(dataset.chosen_batches([[0, 1, 2, 4]], 4, "train", CPU))
    latents = torch.cat(encode_clip(encoder, batch.video, latent_layout(config, *encoder.latent_shape(8)), "split"), dim=1)
    for row, (clip, expected) in enumerate(zip([0, 1, 2, 3], latents, strict=True)):  # clip 3 of the cache is row 4 of the CSV
        out = torch.empty(shards.shape, dtype=shards.dtype)
        latent_shards.read_row(shards, clip, out)
        torch.testing.assert_close(out.float(), expected, rtol=2**-8, atol=1e-5, msg=f"clip {row}")


def test_training_from_the_cache(encoded):
    folder, _ = encoded
    finished = launch(1, str(ROOT / "flperf/train.py"), "--config", str(folder / "cached.yaml"))
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    lines = [json.loads(line) for line in (folder / "experiment/cached/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 6 and all(line["loss"] > 0 for line in lines)


def test_another_configuration_is_refused(encoded):
    folder, _ = encoded
    finished = encode(folder, "latents", "dataset.stride=1")
    assert finished.returncode == 1 and "was encoded with another configuration" in finished.stderr.splitlines()[-1]


def test_the_seeds_format(demo):
    assert encode(demo, "files", "--files", "dataset.limit=6").returncode == 0
    manifest = demo / "files/train/manifest.csv"
    assert len(manifest.read_text().splitlines()) == 1 + 5  # one of the six is broken
    config = load_config(demo / "cached.yaml", [f"dataset.train={manifest}"])
    dataset = open_dataset(config, None, 0)
    assert dataset.latent_shape == (4, 2, 2, 24) and dataset.train_size == 5


def _preprocessing(folder):
    from flperf.data import Preprocessing

    return Preprocessing.of(load_config(folder / "video.yaml").backbone)
