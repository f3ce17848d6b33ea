"""Locators find the shapes, and say in pixels what a forecast knows."""

import json
from types import SimpleNamespace

import pytest
import torch
from runs import BACKBONES, FOUR_DS, REGIMES, ROOT, TINY

from flperf.commands.evaluate import evaluate
from flperf.commands.locator import locator
from flperf.config import load_config
from flperf.data import BatchShare
from flperf.data.bouncing_shapes import patch_heatmaps
from flperf.data.samplers import ClipBatch
from flperf.errors import UserError
from flperf.evaluation.locator import (
    LOCATORS,
    FrameLatents,
    Locator,
    PixelErrors,
    frame_centres,
    load_locator,
    save_locator,
    train_locator,
)
from flperf.models.latents import LatentGeometry, Normaliser, Statistics
from flperf.train import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", LOCATORS)
def test_it_finds_what_latents_show(kind):
    """Latents that hold the heatmap of each shape in a channel of its own, at an odd scale: found to a pixel of 64."""
    generator = torch.Generator().manual_seed(0)
    locator = Locator(kind, (4, 4, 6), 64)
    locator.std.fill_(30.0)
    optimizer = torch.optim.Adam(locator.parameters(), 3e-3)

    def drawn(count):
        centres = torch.rand(count, 2, 2, generator=generator) * 48 + 8
        latents = torch.zeros(count, 4, 4, 6)
        latents[..., :2] = 100 * patch_heatmaps(centres, 64, 4, 4).permute(0, 2, 3, 1)
        return latents, centres

    for _ in range(300):
        optimizer.zero_grad()
        locator.loss(*drawn(64)).backward()
        optimizer.step()
    latents, centres = drawn(200)
    errors = (locator.locate(latents) - centres).norm(dim=-1)
    assert errors.mean() < 1.0
    assert locator.locate(latents.view(20, 10, 4, 4, 6)).shape == (20, 10, 2, 2)


def test_a_latent_frame_is_where_the_frames_it_covers_are():
    centres = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 2)  # moves a pixel a frame
    both = frame_centres(centres, SimpleNamespace(frames_per_latent=2, frames_covered=2))
    first = frame_centres(centres, SimpleNamespace(frames_per_latent=2, frames_covered=1))
    assert both[0, :, 0, 0].tolist() == [0.5, 2.5] and first[0, :, 0, 0].tolist() == [0.0, 2.0]


def test_pixel_errors_of_a_case_known_on_paper():
    """Latents that are the coordinates themselves: a forecast 3 to the right and 4 below errs by 5, a copy by how far
    things went."""
    locator = SimpleNamespace(locate=lambda latents: latents[:, :, 0, 0].unflatten(-1, (2, 2)))
    config = SimpleNamespace(dataset=SimpleNamespace(kind="bouncing_shapes"))
    statistics = Statistics(torch.full((4,), 7.0), torch.full((4,), 2.0))
    run = SimpleNamespace(config=config, geometry=LatentGeometry(1, 2, 1, 1, 4), process=SimpleNamespace(device=CPU))
    run.encoder = SimpleNamespace(frames_per_latent=1, frames_covered=1)
    run.normaliser = Normaliser("standardize", torch.float32, statistics)
    centres = torch.tensor([10.0, 20.0, 40.0]).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    target = run.normaliser(centres[:, 1:].flatten(-2)[:, :, None, None])
    moved = target + torch.tensor([3.0, 4.0, 3.0, 4.0]) / 2  # in standardised latents
    copied = run.normaliser(centres[:, :1].flatten(-2)[:, :, None, None])
    errors = PixelErrors(locator, run)
    batch = ClipBatch(torch.zeros(2), torch.arange(2), torch.arange(2), torch.tensor([True, False]), centres=centres)
    for latents in (target, moved, copied):
        latents[1] = torch.nan  # an invalid clip counts nothing
    errors.add({"forecast": moved, "copy_last": copied, "target": target}, batch)
    result = errors.result()
    assert result["forecast"] == pytest.approx([5.0, 5.0]) and result["target"] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert result["copy_last"] == pytest.approx([10 * 2**0.5, 30 * 2**0.5])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("locator")
    (folder / "tiny.yaml").write_text(TINY.format(folder=folder))
    return folder


def test_training_evaluating_and_refusing(folder, capsys):
    config = str(folder / "tiny.yaml")
    file = folder / "locator.safetensors"
    locator(["--config", config, "--out", str(file), "--head", "heatmap", "--steps", "3"])
    assert "pixels of 256" in capsys.readouterr().out
    train(["--config", config, *REGIMES["flow_matching"]])
    evaluate(
        ["--checkpoint", str(folder / "experiment/tiny"), "--locator", str(file), "--out", str(folder / "out.jsonl")]
    )
    result = json.loads((folder / "out.jsonl").read_text())
    located = result["locator"]
    assert result["norm"] == "standardize" and "one sample" in capsys.readouterr().out
    assert {name: len(errors) for name, errors in located.items()} == {
        "forecast": 2,
        "sample": 2,
        "copy_last": 2,
        "target": 2,
    }
    assert located["sample"] != located["forecast"], "the mean of two samples is neither of them"
    assert all(0 < error < 256 for errors in located.values() for error in errors)
    with pytest.raises(UserError, match="another encoder or canvas"):
        load_locator(file, load_config(config, ["backbone.architecture.num_hidden_layers=1"]), CPU)
    with pytest.raises(UserError, match="not written by `flperf locator`|can't be read|can be read"):
        load_locator(folder / "tiny.yaml", load_config(config, []), CPU)


def test_a_locator_is_read_as_it_was_written(folder):
    config = load_config(str(folder / "tiny.yaml"), [])
    locator, error = train_locator(config, "coordinates", 2, CPU)
    save_locator(folder / "again.safetensors", locator, config)
    latents = torch.randn(3, 2, 2, 24)
    assert error > 0 and torch.equal(
        load_locator(folder / "again.safetensors", config, CPU).locate(latents), locator.locate(latents)
    )


@pytest.mark.parametrize("kind", ["vjepa2", "dinov3", "4ds"])
def test_what_it_learns_from_single_images_it_finds_in_clips(folder, kind):
    """An image is a video that stands still for one latent frame."""
    overrides = {**BACKBONES, "4ds": FOUR_DS}[kind]
    images = load_config(str(folder / "tiny.yaml"), [*overrides, "dataset.n_frames=1"])
    locator, error = train_locator(images, "heatmap", 2, CPU)
    save_locator(folder / f"{kind}.safetensors", locator, images)
    assert 0 < error < 256
    frames = FrameLatents(images, CPU)
    batch = next(frames.dataset.train_batches(0, BatchShare(0, 1, 3, 3), CPU))
    latents, centres = frames.of(batch)
    assert latents.shape == (3, 2, 2, 24) and torch.equal(centres, batch.centres[:, 0])
    clips = FrameLatents(load_config(str(folder / "tiny.yaml"), overrides), CPU)
    of_clips, _ = clips.of(next(clips.dataset.train_batches(0, BatchShare(0, 1, 3, 3), CPU)))
    assert load_locator(folder / f"{kind}.safetensors", clips.config, CPU).locate(of_clips).shape == (12, 2, 2)


def test_without_known_positions_there_is_nothing_to_learn():
    with pytest.raises(UserError, match="bouncing_shapes"):
        train_locator(load_config(str(ROOT / "configs/demo.yaml"), []), "coordinates", 1, CPU)
