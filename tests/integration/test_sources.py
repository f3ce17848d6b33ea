"""Training on a mixture of sources: the shares that were asked for, the same after a stop, and from encoded latents."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from worlds import flperf

from flperf.data.demo import write_demo

SIZES = {"a": 6, "b": 3}


@pytest.fixture(scope="module")
def cached(tiny, tmp_path_factory) -> list[str]:
    """Options of a run on two sources of cached latents; those of b are larger than those of a."""
    folder = tmp_path_factory.mktemp("latents")
    for number, (name, clips) in enumerate(SIZES.items()):
        for clip in range(clips):
            torch.save(torch.randn(24, 4, 2, 2) + 100 * number, folder / f"{name}{clip}.pt")
        rows = [f"{name}{clip}.pt" for clip in range(clips)]
        (folder / f"{name}.csv").write_text("\n".join(["out_path", *rows]))
    keys = f"[{{train: {folder}/a.csv, weight: 1}}, {{train: {folder}/b.csv, weight: 3}}]"
    return [f"dataset.sources={keys}", "dataset.kind=kinetics_400_cached", "trainer.batch_size=16"]


def trained(tiny: Path, *options: str):
    finished = flperf("train", "--config", str(tiny), *options)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished


def metrics(tiny: Path, name: str) -> list[dict]:
    """The logged values of the training steps of a run, without those of time."""
    lines = (tiny.parent / "experiment" / name / "metrics.jsonl").read_text().splitlines()
    return [{key: line.get(key) for key in ("step", "epoch", "loss", "grad_norm")} for line in map(json.loads, lines)]


def test_a_mixture_resumes_as_if_undisturbed(tiny, cached):
    """Bit for bit, and only with the same weights. An epoch is as many samples as the sources have clips: 9."""
    budget = ["trainer.max_steps=null", "trainer.max_epochs=8"]  # 72 samples: five steps
    whole = trained(tiny, *cached, *budget, "name=mixed-whole", "latents.statistics_clips=9")
    trained(tiny, *cached, *budget, "name=mixed-parts", "latents.statistics_clips=9", "trainer.stop_after=2")
    changed = [cached[0].replace("weight: 3", "weight: 2"), *cached[1:], *budget, "name=mixed-parts"]
    refused = flperf("train", "--config", str(tiny), *changed, "latents.statistics_clips=9")
    assert refused.returncode and "dataset.sources[1].weight: 3.0 -> 2.0" in refused.stderr + refused.stdout
    trained(tiny, *cached, *budget, "name=mixed-parts", "latents.statistics_clips=9")
    assert metrics(tiny, "mixed-whole") == metrics(tiny, "mixed-parts")
    assert [line["epoch"] for line in metrics(tiny, "mixed-whole")] == [1, 3, 5, 7, 8]
    assert re.search(r"b\.csv: 3 clips, 0\.75 of the samples; an epoch reads each clip 2\.25 times", whole.stdout)


def test_statistics_are_measured_over_the_mixture(tiny, cached):
    """The two sources have means of 0 and 100, and a quarter of the samples are of the first."""
    options = [*cached, "name=mixed-statistics", "trainer.batch_size=64", "trainer.max_steps=1"]
    folder = tiny.parent / "experiment/mixed-statistics"
    trained(tiny, *options)
    statistics = load_file(folder / "latent_statistics.safetensors")
    assert (statistics["channel_mean"] - 75).abs().max() < 3


def test_sources_are_encoded_each_into_a_folder_of_its_own(tiny, tmp_path):
    """And are mixed from there."""
    write_demo(tmp_path / "demo", {"train": 5, "validation": 2})
    rows = (tmp_path / "demo/train.csv").read_text().splitlines(keepends=True)
    for name, part in (("first", rows[:2]), ("second", rows[2:])):
        (tmp_path / f"demo/{name}.csv").write_text("".join(part))
    files = [f"{tmp_path}/demo/{name}.csv" for name in ("first", "second")]
    keys = ["dataset.kind=kinetics_400", f"dataset.validation={tmp_path}/demo/validation.csv", "name=encoded-sources"]
    sources = f"dataset.sources=[{{train: {files[0]}}}, {{train: {files[1]}}}]"
    finished = flperf("encode", "--config", str(tiny), "--out", str(tmp_path / "out"), *keys, sources)
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    manifests = [tmp_path / "out" / name / "manifest.csv" for name in ("train_0", "train_1", "validation")]
    assert [len(manifest.read_text().splitlines()) - 1 for manifest in manifests] == [2, 3, 2]
    assert not (tmp_path / "out/train").exists()
    cached = f"dataset.sources=[{{train: {manifests[0]}, weight: 2}}, {{train: {manifests[1]}}}]"
    trained(tiny, "dataset.kind=kinetics_400_cached", f"dataset.validation={manifests[2]}", keys[2], cached)
    assert metrics(tiny, "encoded-sources")[-1]["step"] == 4
