"""Locators find the shapes in latents, and measure the error of forecasts in pixels."""

from types import SimpleNamespace

import pytest
import torch
from runs import BACKBONES, FOUR_DS, ROOT

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

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", LOCATORS)
def test_a_locator_finds_the_shapes_that_latents_show(kind):
    """Latents with the heatmap of each shape in one channel, at an unusual scale: found to within a pixel of 64."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    locator = Locator(kind, (4, 4, 6), 64)
    locator.std.fill_(30.0)
    optimizer = torch.optim.Adam(locator.parameters(), 1e-2)

    def drawn(count):
        centres = torch.rand(count, 2, 2, generator=generator) * 48 + 8
        latents = torch.zeros(count, 4, 4, 6)
        latents[..., :2] = 100 * patch_heatmaps(centres, 64, 4, 4).permute(0, 2, 3, 1)
        return latents, centres

    for _ in range(100):
        optimizer.zero_grad()
        locator.loss(*drawn(64)).backward()
        optimizer.step()
    latents, centres = drawn(200)
    errors = (locator.locate(latents) - centres).norm(dim=-1)
    assert errors.mean() < 1.0
    assert locator.locate(latents.view(20, 10, 4, 4, 6)).shape == (20, 10, 2, 2)


def test_centres_of_a_latent_frame_are_means_over_the_video_frames_it_covers():
    centres = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 2)  # moves by a pixel per frame
    both = frame_centres(centres, SimpleNamespace(frames_per_latent=2, frames_covered=2))
    first = frame_centres(centres, SimpleNamespace(frames_per_latent=2, frames_covered=1))
    assert both[0, :, 0, 0].tolist() == [0.5, 2.5] and first[0, :, 0, 0].tolist() == [0.0, 2.0]


def test_pixel_errors_of_known_positions():
    """The latents are the coordinates. The error of a forecast that is 3 to the right and 4 below is 5; that of the
    repeated context is the distance moved."""
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
        latents[1] = torch.nan  # an invalid clip is not counted
    errors.add({"forecast": moved, "copy_last": copied, "target": target}, batch)
    result = errors.result()
    assert result["forecast"] == pytest.approx([5.0, 5.0]) and result["target"] == pytest.approx([0.0, 0.0], abs=1e-5)
    assert result["copy_last"] == pytest.approx([10 * 2**0.5, 30 * 2**0.5])


def test_a_locator_is_read_as_it_was_written(tiny, tmp_path):
    config = load_config(tiny)
    locator, error = train_locator(config, "coordinates", 2, CPU)
    file = tmp_path / "locator.safetensors"
    save_locator(file, locator, config)
    latents = torch.randn(3, 2, 2, 24)
    assert error > 0 and torch.equal(load_locator(file, config, CPU).locate(latents), locator.locate(latents))
    with pytest.raises(UserError, match="another encoder or canvas"):
        load_locator(file, load_config(tiny, ["backbone.architecture.num_hidden_layers=1"]), CPU)
    with pytest.raises(UserError, match="tiny.yaml: "):
        load_locator(tiny, config, CPU)


@pytest.mark.parametrize("kind", ["vjepa2", "dinov3", "4ds"])
def test_a_locator_trained_on_single_images_works_on_clips(tiny, tmp_path, kind):
    """An image is repeated for the video frames of one latent frame."""
    overrides = {**BACKBONES, "4ds": FOUR_DS}[kind]
    images = load_config(tiny, [*overrides, "dataset.n_frames=1"])
    locator, error = train_locator(images, "heatmap", 2, CPU)
    save_locator(tmp_path / f"{kind}.safetensors", locator, images)
    assert 0 < error < 256
    frames = FrameLatents(images, CPU)
    batch = next(frames.dataset.train_batches(0, BatchShare(0, 1, 3, 3), CPU))
    latents, centres = frames.encode(batch)
    assert latents.shape == (3, 2, 2, 24) and torch.equal(centres, batch.centres[:, 0])
    clips = FrameLatents(load_config(tiny, overrides), CPU)
    of_clips, _ = clips.encode(next(clips.dataset.train_batches(0, BatchShare(0, 1, 3, 3), CPU)))
    assert load_locator(tmp_path / f"{kind}.safetensors", clips.config, CPU).locate(of_clips).shape == (12, 2, 2)


def test_a_dataset_without_known_positions_is_refused():
    with pytest.raises(UserError, match="bouncing_shapes"):
        train_locator(load_config(ROOT / "configs/demo.yaml"), "coordinates", 1, CPU)
