"""The schedules of learning rate and decay, and the moving average of the weights."""

import pytest
import torch

from flperf.config import Trainer
from flperf.engine.optimizer import AdamWWithEMA, ema_decay, learning_rate


def test_the_learning_rate_warms_up_then_falls_to_its_final_value():
    trainer = Trainer(learning_rate=1.0, warmup_steps=4, final_learning_rate=0.1)
    rates = [learning_rate(step, trainer, 20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < earlier for earlier, later in zip(rates[4:], rates[5:], strict=False))
    assert rates[20] == pytest.approx(0.1)


def test_the_decay_grows_to_its_final_value():
    trainer = Trainer(ema_decay=0.99)
    decays = [ema_decay(step, trainer) for step in (0, 9, 10**6)]
    assert decays == pytest.approx([0.1, 10 / 19, 0.99])
    assert ema_decay(0, Trainer(ema_decay=None)) is None


def test_the_average_is_that_of_the_weights_before_and_after_each_update():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWWithEMA([{"params": [weight], "ema_decay": 0.75, "lr": 0.1}], Trainer(), clip=False)
    averages = []
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
        averages.append(optimizer.state[weight]["ema"].clone())
    first, second = averages
    assert 0 < weight[0] < first[0]  # the first average is the first updated weight
    assert torch.allclose(second, 0.75 * first + 0.25 * weight.detach())


def test_a_non_finite_update_is_skipped_and_a_large_gradient_clipped():
    weight = torch.nn.Parameter(torch.ones(4))
    groups = [{"params": [weight], "ema_decay": None, "lr": 0.1}]
    optimizer = AdamWWithEMA(groups, Trainer(max_grad_norm=1.0), clip=True)
    weight.grad = torch.tensor([torch.nan, 0.0, 0.0, 0.0])
    optimizer.step()
    assert weight.tolist() == [1.0] * 4 and not optimizer.state
    weight.grad = torch.full((4,), 100.0)
    optimizer.step()
    assert (weight < 1).all() and weight.grad.norm() == pytest.approx(1.0)
