"""Pictures of forecasts: videos that play, tensors as they were given, and one basis for all colours."""

import av
import numpy as np
import pytest
import torch

from flperf.errors import UserError
from flperf.evaluation.visualise import Example, Projection, convert_video_tensor_to_mp4, save_mp4_video, write_example
from flperf.models.baselines import Baselines

FILES = {"video.pt", "video.mp4", "overview.png"} | {
    f"{part}_{what}" for part in ("context", "target", "prediction") for what in ("latents.pt", "pca.pt", "pca.mp4")
}


def latents(frames: int, seed: int = 0, dim: int = 6) -> torch.Tensor:
    return torch.randn(frames, 4, 5, dim, generator=torch.Generator().manual_seed(seed))


def example(**replaced) -> Example:
    zeros = torch.zeros(3, 4, 5, 6)
    baselines = Baselines(zeros, zeros, torch.zeros(3, 19, 6))
    video = torch.randint(0, 256, (10, 63, 65, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Example(
        **{
            "context": latents(2),
            "forecast": latents(3, 1),
            "target": latents(3, 2),
            "video": video,
            "baselines": baselines,
        }
        | replaced
    )


def decoded(path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


@pytest.mark.parametrize("size", [(64, 48), (63, 65), (1, 7)])
def test_a_video_plays_what_was_written(tmp_path, size):
    """H.264 at this quality has an error of a few levels on a smooth picture. Odd sizes get a repeated last line."""
    y, x = (torch.linspace(0, 1, n) for n in size)
    video = torch.stack([(y[:, None] + x + phase) / 3 for phase in torch.linspace(0, 1, 9)])[:, None].repeat(1, 3, 1, 1)
    frames, rate = convert_video_tensor_to_mp4(video)
    path = save_mp4_video(frames, tmp_path / "clip", rate)
    played, played_rate = decoded(path)
    assert path.name == "clip.mp4" and played.shape == frames.shape and played_rate == rate
    assert frames.shape[1] - size[0] in (0, 1) and frames.shape[2] - size[1] in (0, 1) and not frames.shape[1] % 2
    expected = (video * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(frames[:, : size[0], : size[1]].astype(float) - expected).max() == 0
    assert np.abs(played.astype(float) - frames).mean() < 3


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match="t c h w"):
        convert_video_tensor_to_mp4(torch.zeros(3, 8, 8))


def test_colours_have_one_basis():
    first = latents(5)
    projection = Projection(first)
    assert torch.equal(projection(first), Projection(first.clone())(first))
    assert projection(first).min() >= 0 and projection(first).max() <= 1
    assert torch.equal(projection(first[2:3]), projection(first)[2:3])
    # Latents that differ only along a weak component have the same colours.
    weak = torch.linalg.eigh(first.flatten(0, -2).double().T.cov()).eigenvectors[:, 0].float()
    torch.testing.assert_close(projection(first + 3 * weak), projection(first), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "values", [torch.zeros(3, 2, 2, 8), latents(3, dim=2), latents(3, dim=1)], ids=["constant", "two", "one"]
)
def test_degenerate_latents_have_finite_colours(values):
    colours = Projection(values)(values)
    assert colours.shape == (*values.shape[:3], 3) and torch.isfinite(colours).all()


def test_an_example_has_the_tensors_that_were_given(tmp_path):
    given = example()
    picture = write_example(tmp_path / "clip", given)
    assert picture.read_bytes()[:4] == b"\x89PNG" and {path.name for path in (tmp_path / "clip").iterdir()} == FILES
    load = lambda name: torch.load(tmp_path / "clip" / f"{name}.pt", weights_only=True)  # noqa: E731
    for name, tensor in (("context", given.context), ("target", given.target), ("prediction", given.forecast)):
        assert torch.equal(load(f"{name}_latents"), tensor)
        assert load(f"{name}_pca").shape == (*tensor.shape[:3], 3)
    assert torch.equal(load("video"), given.video.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("replaced", "missing"),
    [
        ({"video": None}, {"video.pt", "video.mp4"}),
        ({"target": None, "baselines": None}, {"target_latents.pt", "target_pca.pt", "target_pca.mp4"}),
        ({"forecast": latents(30, 1)}, set()),  # a roll-out far beyond the truth
        ({"forecast": latents(1, 1)}, set()),
    ],
    ids=["cached latents", "an unknown future", "a long roll-out", "a short forecast"],
)
def test_unknown_parts_of_an_example_are_left_out(tmp_path, replaced, missing):
    write_example(tmp_path / "clip", example(**replaced))
    assert {path.name for path in (tmp_path / "clip").iterdir()} == FILES - missing


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_example(tmp_path / "file" / "clip", example())
