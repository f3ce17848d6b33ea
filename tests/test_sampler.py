import math

import torch

from flperf.sampler import euler


def test_a_constant_velocity_is_followed_exactly():
    noise = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(euler(lambda x, tau: torch.full_like(x, 2.0), noise, 3), noise + 2.0)


def test_euler_converges_at_first_order():
    errors = [abs(float(euler(lambda x, tau: x, torch.ones(1, dtype=torch.float64), steps)) - math.e) for steps in (64, 128)]
    assert 1.9 < errors[0] / errors[1] < 2.1


def test_time_runs_from_noise_to_data():
    times = []
    euler(lambda x, tau: times.append(tau) or x, torch.zeros(1), 4)
    assert times == [0.0, 0.25, 0.5, 0.75]
