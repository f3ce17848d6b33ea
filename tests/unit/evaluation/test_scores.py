"""Skill, spread, and the flat dictionary of metrics.jsonl, from scores that are written out."""

import pytest
import torch

from flperf.evaluation.metrics import ERRORS
from flperf.evaluation.report import summary, table
from flperf.evaluation.scores import Scores
from flperf.models.baselines import BASELINES


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def scores(samples: int = 1) -> Scores:
    """Two frames ahead: errors 1 and 3 of the forecast; 2 and 4, or in the mean 3, of the best baseline."""
    columns = [*ERRORS, "frechet"]
    errors = {"forecast": dict.fromkeys(columns, tensor(1, 3, 2))}
    errors |= {name: dict.fromkeys(columns, tensor(5, 4, 4.5)) for name in BASELINES}
    errors["ridge"] = dict.fromkeys(columns, tensor(2, 5, 3.5))
    if samples > 1:
        errors |= {name: dict.fromkeys(("l1", "mse"), tensor(1, 2, 1.75)) for name in ("sample", "best")}
    return Scores("l2", 7, 0.5, samples, errors, tensor(0.75, 2.25, 1.5) if samples > 1 else None)


def test_skill_is_relative_to_the_best_baseline_of_each_frame():
    assert scores().skill("l1").tolist() == [1 - 1 / 2, 1 - 3 / 4, 1 - 2 / 3.5]


def test_skill_is_finite_where_a_baseline_is_perfect():
    perfect = scores()
    perfect.errors["copy_last"]["mse"] = perfect.errors["forecast"]["mse"] = tensor(0, 0, 0)
    assert perfect.skill("mse").tolist() == [1, 1, 1]


def test_the_spread_of_calibrated_samples_is_one():
    """3 samples with the variance 0.75 of the squared error of their mean."""
    assert scores(samples=3).spread().tolist() == [1, 1, 1]


def test_the_dictionary_has_every_score_over_all_frames_and_by_horizon():
    result = scores().as_dict()
    assert (result["norm"], result["clips"], result["loss"]) == ("l2", 7, 0.5)
    assert (result["forecast_l1"], result["ridge_frechet"]) == (2, 3.5)
    assert result["horizon"]["forecast_l1"] == [1, 3] and result["horizon"]["skill_l1"] == [0.5, 0.25]
    forecasts = {f"{name}_{error}" for name in ("forecast", *BASELINES) for error in (*ERRORS, "frechet")}
    keys = forecasts | {f"skill_{error}" for error in ERRORS}
    assert result.keys() == keys | {"norm", "clips", "loss", "horizon"} and result["horizon"].keys() == keys
    added = scores(samples=3).as_dict().keys() - result.keys()
    assert added == {"sample_l1", "sample_mse", "best_l1", "best_mse", "variance", "spread"}


def test_the_report_shows_errors_skill_and_samples():
    columns, rows = table(scores())
    assert columns == ["forecast", "L1", "MSE", "1 - cos", "energy", "Fréchet"]
    assert rows[0] == ["forecast", *[2.0] * 5] and rows[-1] == ["ridge", *[3.5] * 5]
    assert summary(scores(samples=3)).splitlines() == [
        "                     L1      MSE  1 - cos   energy  Fréchet",
        "      forecast   2.0000   2.0000   2.0000   2.0000   2.0000",
        "     copy last   4.5000   4.5000   4.5000   4.5000   4.5000",
        "   mean latent   4.5000   4.5000   4.5000   4.5000   4.5000",
        " median latent   4.5000   4.5000   4.5000   4.5000   4.5000",
        "         ridge   3.5000   3.5000   3.5000   3.5000   3.5000",
        "         skill    42.9%    42.9%    42.9%    42.9%",
        "  frames ahead       +1       +2",
        "    skill (L1)    50.0%    25.0%",
        "       samples  L1 of one 1.7500, of the best 1.7500; spread / error 1.00 (1 is calibrated)",
    ]


@pytest.mark.parametrize(("frames", "shown"), [(1, ["+1"]), (16, ["+1", "+3", "+5", "+7", "+10", "+12", "+14", "+16"])])
def test_the_report_shows_at_most_eight_frames(frames, shown):
    errors = {name: dict.fromkeys([*ERRORS, "frechet"], torch.ones(frames + 1)) for name in ("forecast", *BASELINES)}
    text = summary(Scores("none", 1, 0.0, 1, errors, None))
    assert text.splitlines()[-2].split()[2:] == shown
