import pytest
import torch
from safetensors import SafetensorError

from flperf.config import Config, UserError
from flperf.latents import Layout, Normaliser, Statistics, StatisticsMeter, latent_layout

LAYOUT = Layout(context_frames=2, target_frames=3, height=2, width=2, dim=5)


def random_latents(clips: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(clips)
    draw = lambda frames: 3 * torch.randn(clips, frames, 2, 2, 5, generator=generator) + torch.arange(5.0)  # noqa: E731
    return draw(2), draw(3)


def test_standardised_latents_have_zero_mean_and_unit_deviation_per_channel():
    context, target = random_latents(64)
    meter = StatisticsMeter("standardize", LAYOUT, torch.device("cpu"))
    meter.update(context, target)
    normaliser = Normaliser("standardize", torch.float32, meter.result())
    tokens = torch.cat([normaliser(x).flatten(0, -2) for x in (context, target)])
    torch.testing.assert_close(tokens.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(0, correction=0), torch.ones(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["none", "l1", "l2", "layer", "standardize"])
def test_position_mean_is_the_mean_of_normalised_targets_however_clips_are_batched(kind):
    pairs = [random_latents(clips) for clips in (4, 7)]
    meter = StatisticsMeter(kind, LAYOUT, torch.device("cpu"))
    for pair in pairs:
        meter.update(*pair)
    statistics = meter.result()
    normaliser = Normaliser(kind, torch.float32, statistics)
    expected = torch.cat([normaliser(target) for _, target in pairs]).mean(0)
    torch.testing.assert_close(statistics.position_mean, expected, atol=1e-5, rtol=1e-5)


def test_token_norms():
    context, _ = random_latents(3)
    token_norm = lambda kind, p: Normaliser(kind, torch.float32)(context).norm(p=p, dim=-1)  # noqa: E731
    torch.testing.assert_close(token_norm("l2", 2), torch.ones(3, 2, 2, 2))
    torch.testing.assert_close(token_norm("l1", 1), torch.ones(3, 2, 2, 2))
    layered = Normaliser("layer", torch.float32)(context)
    torch.testing.assert_close(layered.mean(-1), torch.zeros(3, 2, 2, 2), atol=1e-6, rtol=0)


def test_a_constant_channel_stays_finite():
    context, target = random_latents(4)
    context[..., 0] = target[..., 0] = 2.0
    meter = StatisticsMeter("standardize", LAYOUT, torch.device("cpu"))
    meter.update(context, target)
    assert Normaliser("standardize", torch.float32, meter.result())(target)[..., 0].abs().max() < 1e-5


def test_statistics_are_stored_exactly(tmp_path):
    meter = StatisticsMeter("standardize", LAYOUT, torch.device("cpu"))
    meter.update(*random_latents(4))
    statistics = meter.result()
    statistics.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors", torch.device("cpu"))
    assert all(torch.equal(getattr(statistics, name), getattr(again, name)) for name in vars(statistics))
    (tmp_path / "s.safetensors").write_bytes(b"nonsense")
    with pytest.raises(SafetensorError):
        Statistics.load(tmp_path / "s.safetensors", torch.device("cpu"))


def test_layout_splits_the_clip():
    config = Config()
    config.model.num_context_latents = 3
    assert latent_layout(config, 8, 2, 2, 5) == Layout(3, 5, 2, 2, 5)
    config.model.num_target_latents = 2
    assert latent_layout(config, 8, 2, 2, 5) == Layout(3, 2, 2, 2, 5)
    for frames in (3, 4):
        with pytest.raises(UserError, match="num_context_latents"):
            latent_layout(config, frames, 2, 2, 5)
