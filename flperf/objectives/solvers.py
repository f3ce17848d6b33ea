"""From noise at tau = 0 to a forecast at tau = 1, along the velocity that a flow-matching head has learnt.

The solvers are torchdiffeq's. Fixed-step ones take `steps` steps on a grid that the shift may bend as it bends
training's tau: above 1 the steps are shorter near the noise, where the velocity decides most.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flperf.config import Sampling

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x, tau, a scalar on its device) to dx/dtau

# Names of torchdiffeq, and how often each evaluates the velocity a step.
SOLVERS = {"euler": ("euler", 1), "midpoint": ("midpoint", 2), "heun": ("heun2", 2), "dopri5": ("dopri5", None)}


def time_grid(steps: int, shift: float) -> Tensor:
    """Times from 0 to 1, fp64 [steps + 1]: u / (u + shift (1 - u)) of equally spaced u."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return u / (u + shift * (1 - u))


def integrate(velocity: Velocity, noise: Tensor, sampling: Sampling) -> Tensor:
    """Integrate dx/dtau = velocity(x, tau) from noise at tau = 0 to tau = 1; x has the shape and dtype (fp32,
    fp64) of the noise."""
    from torchdiffeq import odeint  # here, since it loads SciPy, which takes a second of every start

    method, evaluations = SOLVERS[sampling.solver]
    if evaluations is None:
        options, tolerances = {}, {"rtol": sampling.tolerance, "atol": sampling.tolerance}
    else:
        grid = time_grid(sampling.steps, sampling.shift).to(noise.device)
        options, tolerances = {"grid_constructor": lambda function, x, ends: grid}, {}
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=noise.device)
    return odeint(
        lambda tau, x: velocity(x, tau).to(x.dtype), noise, ends, method=method, options=options, **tolerances
    )[-1]


def guided(conditional: Velocity, unconditional: Velocity, sampling: Sampling) -> Velocity:
    """Classifier-free guidance (Ho and Salimans, arXiv:2207.12598): unconditional + guidance (conditional -
    unconditional), inside the interval of tau (Kynkaanniemi et al., arXiv:2404.07724) only; outside it, the
    conditional velocity alone. Velocities have the shape of x; tau is a scalar."""
    first, last = sampling.guidance_interval

    def velocity(x: Tensor, tau: Tensor) -> Tensor:
        with_context = conditional(x, tau)
        if (first, last) != (0, 1) and not first <= float(tau) <= last:  # the comparison waits for the device
            return with_context
        return torch.lerp(unconditional(x, tau), with_context, sampling.guidance)

    return velocity
