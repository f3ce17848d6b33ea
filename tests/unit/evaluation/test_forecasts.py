"""The horizon of a forecast in seconds, by backbone, stride and frames a second."""

import math
from types import SimpleNamespace

import pytest
import torch
from runs import BACKBONES, FOUR_DS, TINY

from flperf.commands.sample import sample
from flperf.config import Dataset, parse_config
from flperf.data.preprocessing import Preprocessing
from flperf.data.unreadable import BadClip
from flperf.errors import UserError
from flperf.evaluation import forecasts
from flperf.evaluation.forecasts import Pace, clip_paces, frame_interval
from flperf.forecaster import Forecaster
from flperf.models.encoder import Encoder

KINDS = {
    "vjepa2": BACKBONES["vjepa2"],
    "dinov3": [*BACKBONES["dinov3"], "backbone.frame_stride=4"],
    "4ds": FOUR_DS,
}


def encoder(kind: str, folder) -> Encoder:
    config = parse_config(TINY.format(folder=folder), "tiny", ["name=tiny", *KINDS[kind]])
    return Encoder(config.backbone, Preprocessing.of(config.backbone), torch.float32)


@pytest.mark.parametrize(
    ("kind", "thirtieths"),
    [("vjepa2", [2, 4, 6]), ("dinov3", [1, 5, 9]), ("4ds", [2, 4, 6])],
)
def test_the_time_of_a_latent_frame_is_that_of_the_last_frame_it_covers(kind, thirtieths, tmp_path):
    """At 30 frames a second and stride 1: DINOv3 at frame stride 4 encodes the first frame after the context."""
    built = encoder(kind, tmp_path)
    pace = Pace(1 / 30, built.frames_per_latent, built.frames_covered)
    assert pace.seconds_ahead(3) == pytest.approx([count / 30 for count in thirtieths])
    assert [pace.frames_for(count / 30) for count in thirtieths] == [1, 2, 3]
    assert [pace.frames_for(count / 30 + 1e-3) for count in thirtieths] == [2, 3, 4]
    assert pace.frames_for(1e-6) == 1


def test_the_first_latent_frame_of_dinov3_is_the_first_frame_after_the_context(tmp_path):
    """The claim above, by the frames that change it."""
    built = encoder("dinov3", tmp_path)
    video = torch.randint(0, 255, (1, 16, *built.resolution, 3), dtype=torch.uint8)  # 2 latent frames each
    before, changing = built(video)[:, 2], []
    for frame in range(16):
        other = video.clone()
        other[:, frame] = 255 - other[:, frame]
        changing += [] if torch.equal(built(other)[:, 2], before) else [frame]
    assert changing == [8]


@pytest.mark.parametrize("per_latent", [1, 2, 4])
@pytest.mark.parametrize("covered", [1, 2])
def test_frames_reach_the_seconds_asked_for_and_no_further(per_latent, covered):
    for interval in (1 / 12, 2 / 25, 1001 / 30000):
        pace = Pace(interval, per_latent, covered)
        for seconds in (0.01, 0.1, 1 / 3, 1.0, 7.77):
            ahead = pace.seconds_ahead(pace.frames_for(seconds))
            assert ahead[-1] >= seconds - 1e-9 and (len(ahead) == 1 or ahead[-2] < seconds)


def test_frames_of_a_clip_are_by_fps_or_by_the_rate_of_the_file():
    def rate(path):
        if path == "bad.mp4":
            raise BadClip(path, "no video")
        return 24.0

    assert frame_interval(Dataset(stride=2), rate, "a.mp4") == 2 / 24
    assert frame_interval(Dataset(stride=2, fps=15.0), rate, "a.mp4") == 1 / 15
    assert frame_interval(Dataset(stride=2, fps=15.0), rate, "bad.mp4") == 1 / 15
    assert frame_interval(Dataset(stride=2), rate, "bad.mp4") == math.inf
    dataset = SimpleNamespace(frame_rate=rate, splits={"validation": SimpleNamespace(paths=["a.mp4", "bad.mp4"])})
    run = SimpleNamespace(
        dataset=dataset,
        encoder=SimpleNamespace(frames_per_latent=4, frames_covered=1),
        config=SimpleNamespace(dataset=Dataset(stride=2)),
    )
    assert clip_paces(run, 2) == [Pace(2 / 24, 4, 1), Pace(math.inf, 4, 1)]
    assert max(pace.frames_for(1.0) for pace in clip_paces(run, 2)) == 4  # the times are 1, 5, 9 and 13 twelfths


def indices(length, frame_rate=None, **dataset):
    forecaster = SimpleNamespace(config=SimpleNamespace(dataset=Dataset(**dataset)), context_frames=4)
    return Forecaster._context_indices(forecaster, length, frame_rate).tolist()


def test_the_context_of_a_video_in_memory_ends_with_its_last_frame():
    assert indices(20, stride=3) == indices(20, 5.0, stride=3) == [10, 13, 16, 19]
    for rate in (24, 30000 / 1001, 60.0):
        for stride in (1, 2, 5):
            assert indices(50, rate, stride=99, fps=rate / stride) == indices(50, stride=stride)
    assert indices(20, 25.0, fps=10.0) == [11, 14, 16, 19]  # shown 0.3, 0.2 and 0.1 s before the last
    assert indices(20, 10.0, fps=20.0) == [17, 18, 18, 19]
    assert indices(8, 25.0, fps=10.0)[0] == -1 and indices(9, 25.0, fps=10.0)[0] == 0  # one frame is missing


@pytest.mark.parametrize("frame_rate", [None, 0, -25.0, math.nan, math.inf])
def test_a_missing_frame_rate_is_named(frame_rate):
    with pytest.raises(ValueError, match=r"frame_rate: is .*; needs the video's frames a second, .*dataset.fps is 10"):
        indices(20, frame_rate, fps=10.0)


@pytest.mark.parametrize("option", ["--seconds=nan", "--seconds=inf", "--seconds=-1", "--frames=0", "--clips=0"])
def test_a_horizon_without_end_is_refused(option, tmp_path):
    name = option.split("=")[0]
    with pytest.raises(UserError, match=f"{name}: must be above 0"):
        sample(["--checkpoint", str(tmp_path), "--out", str(tmp_path), option])


def test_forecasts_of_no_usable_clip_are_an_error(tmp_path, monkeypatch):
    """All of the first clips may be short and left out."""
    run = SimpleNamespace(dataset=SimpleNamespace(validation_size=3, frame_rate=None))
    monkeypatch.setattr(forecasts, "_forecasts", lambda *_: ({"clip": torch.empty(0, dtype=torch.int64)}, {}))
    with pytest.raises(UserError, match=r"dataset\.validation: none of its clips could be used; .*short_clips"):
        forecasts.write_forecasts(run, tmp_path / "out", 2, None, None)
    assert not (tmp_path / "out").exists()
