"""Integration of a flow-matching head's velocity from noise at tau = 0 to a forecast at tau = 1.

The solvers are torchdiffeq's. Fixed-step solvers take `steps` steps on a grid that is shifted like tau in training. A
shift above 1 makes the steps near the noise shorter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flperf.config import Sampling

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, tau, a scalar on its device) to dx/dtau

METHODS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "dopri5": "dopri5"}  # torchdiffeq's names


def time_grid(steps: int, shift: float) -> Tensor:
    """Times from 0 to 1, fp64 [steps + 1]: u / (u + shift (1 - u)) for equally spaced u."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return u / (u + shift * (1 - u))


def integrate(velocity: Velocity, noise: Tensor, sampling: Sampling) -> Tensor:
    """Integrate dx/dtau = velocity(x, tau) from the noise at tau = 0 to tau = 1, in the noise's shape and dtype (fp32
    or fp64)."""
    from torchdiffeq import odeint  # here, since it imports SciPy, which takes a second

    if sampling.solver == "dopri5":
        options, tolerances = {}, {"rtol": sampling.tolerance, "atol": sampling.tolerance}
    else:
        grid = time_grid(sampling.steps, sampling.shift).to(noise.device)
        options, tolerances = {"grid_constructor": lambda function, x, ends: grid}, {}
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=noise.device)
    method = METHODS[sampling.solver]
    return odeint(
        lambda tau, x: velocity(x, tau).to(x.dtype), noise, ends, method=method, options=options, **tolerances
    )[-1]


def guided(conditional: Velocity, unconditional: Velocity, sampling: Sampling) -> Velocity:
    """Classifier-free guidance (Ho and Salimans, arXiv:2207.12598): unconditional + guidance (conditional -
    unconditional). Outside the interval of tau (Kynkäänniemi et al., arXiv:2404.07724) the conditional velocity alone.
    Velocities have the shape of x; tau is a scalar."""
    first, last = sampling.guidance_interval

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        with_context = conditional(x, tau)
        if (first, last) != (0, 1) and not first <= float(tau) <= last:  # the comparison waits for the device
            return with_context
        return torch.lerp(unconditional(x, tau), with_context, sampling.guidance)

    return velocity
