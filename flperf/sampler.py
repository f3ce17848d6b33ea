"""From noise at tau = 0 to a forecast at tau = 1, along the velocity that a flow-matching head has learnt."""

from collections.abc import Callable

from torch import Tensor


def euler(velocity: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Integrate dx/dtau = velocity(x, tau) from tau = 0 to 1 in equal steps of the explicit Euler method."""
    x = noise
    for step in range(steps):
        x = x + velocity(x, step / steps) / steps
    return x
