"""SDEs with the marginals of a sampling ODE, in the paper's symbols; free of diffusers.

A sample on the linear interpolant is x = (1 - sigma) x0 + sigma eps. Its velocity field is u = E[eps - x0 | x] and its score

    s(x, sigma) = -(x + (1 - sigma) u) / sigma = -E[eps | x] / sigma.

For any epsilon(sigma) >= 0 the SDE  dx = (-u + epsilon s) dtau + sqrt(2 epsilon) dW,  tau = 1 - sigma,  has the same marginals as the ODE.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Noise = Literal["flow_grpo", "const", "sigma"]


NEAR_THE_END = 0.05
"""sigma may count as 1 where it lacks less than this of it, and does where that is less than a third of what the next step's lacks."""


def diffusion(sigma: Tensor, after: Tensor, noise: Noise, eta: float) -> Tensor:
    """2 epsilon(sigma) (0-dim).

    flow_grpo: eta^2 sigma / (1 - sigma), at sigma = 1 with the next step's sigma ``after`` in the denominator, and so wherever sigma is so
    near to 1 that a step to ``after`` would be full of noise (schedules that begin at 1 - 1e-6, zero terminal SNR); const: eta^2
    (DanceGRPO); sigma: eta^2 sigma (vanishes with the noise, as in SiT).
    """
    if noise == "const":
        return torch.full_like(sigma, eta**2)
    if noise == "sigma":
        return eta**2 * sigma
    lacks, then = 1 - sigma, 1 - after
    near = (lacks < NEAR_THE_END) & (3 * lacks < then)
    return eta**2 * sigma / torch.where(near, then, lacks)


def kick(eps: Tensor, sigma: Tensor, two_epsilon: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(shift of the mean, standard deviation) that the SDE adds to the ODE's step of length ``h`` from ``sigma``.

    A step of no length adds nothing, also at sigma = 0.

    Args:
        eps: E[eps | x] [batch, ...].
    """
    h = h.clamp(min=0)
    return -0.5 * two_epsilon * (h / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)) * eps, (two_epsilon * h).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor, over: Literal["sum", "mean"] = "sum") -> Tensor:
    """log N(x; mean, std^2) [batch]: of the whole sample, or its mean over dimensions. 0 where std is, whose step is certain."""
    z = (x - mean) / std
    each = torch.where(std > 0, -0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi), 0.0).flatten(1)
    return each.sum(1) if over == "sum" else each.mean(1)
