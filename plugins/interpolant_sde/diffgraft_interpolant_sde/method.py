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


def diffusion(sigma: Tensor, first: Tensor, noise: Noise, eta: float) -> Tensor:
    """2 epsilon(sigma) (0-dim).

    flow_grpo: eta^2 sigma / (1 - sigma), at sigma = 1 with the next step's sigma ``first`` in the denominator; const: eta^2 (DanceGRPO);
    sigma: eta^2 sigma (vanishes with the noise, as in SiT).
    """
    if noise == "const":
        return torch.full_like(sigma, eta**2)
    if noise == "sigma":
        return eta**2 * sigma
    return eta**2 * sigma / (1 - torch.where(sigma >= 1, first, sigma))


def kick(eps: Tensor, sigma: Tensor, two_epsilon: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(shift of the mean, standard deviation) that the SDE adds to the ODE's step of length ``h`` from ``sigma``.

    Args:
        eps: E[eps | x] [batch, ...].
    """
    return -0.5 * two_epsilon * h / sigma * eps, (two_epsilon * h).sqrt()


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x; mean, std^2), summed over all but the first dimension [batch]."""
    z = (x - mean) / std
    return (-0.5 * z.square() - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
