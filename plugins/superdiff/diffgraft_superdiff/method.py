"""Superposition of diffusion models with the Ito density estimator, in the paper's symbols; free of diffusers.

Variance-exploding form: x = x0 + sigma eps, sigma falling, d sigma < 0; v_i = E[eps | x] of model (or prompt) i, v_0 the unconditional one.
All sums run over everything but the batch, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample [batch]."""
    return (a.double() * b.double()).flatten(1).sum(1)


def density_change(v: Tensor, dx: Tensor, sigma: Tensor, d_sigma: Tensor, sign: int = 1) -> Tensor:
    """d log q(x) of one model along a step of the SDE (theorem 1; the divergences cancel) [batch].

    -(|d sigma| / sigma) |v|^2 - <dx, v> / sigma. ``sign`` -1 is that of the official OR code in front of |v|^2, which is wrong.
    """
    return -(sign * d_sigma.abs() / sigma * dot(v, v) + dot(dx, v) / sigma)


def mixture(v0: Tensor, va: Tensor, vb: Tensor, kappa: Tensor, w: float) -> Tensor:
    """v_0 + w [(v_b - v_0) + kappa (v_a - v_b)], kappa [batch]."""
    k = kappa.to(v0.dtype).view(-1, *[1] * (v0.ndim - 1))
    return v0 + w * ((vb - v0) + k * (va - vb))


def kappa_or(log_qa: Tensor, log_qb: Tensor, temperature: float, bias: float) -> Tensor:
    """Weight of a when either will do: softmax over T (log q_a + l) and T log q_b [batch]."""
    return torch.sigmoid(temperature * (log_qa + bias - log_qb))


def kappa_and(
    v0: Tensor, va: Tensor, vb: Tensor, noise: Tensor, sigma: Tensor, d_sigma: Tensor, w: float, lift: float, temperature: float
) -> Tensor:
    """Weight of a at which both log-densities change alike in this step (up to ``lift`` / T) [batch].

    1/2 where a and b agree, and in a step that goes nowhere (PNDM repeats a timestep).

    Args:
        noise: the step's noise sqrt(2 |d sigma| sigma) z, the same as in the step itself.
    """
    dx_b = 2 * d_sigma * (v0 + w * (vb - v0)) + noise
    gap = dot(va - vb, va - vb)
    numerator = d_sigma.abs() * dot(vb - va, vb + va) - dot(dx_b, va - vb) + sigma * lift / temperature
    denominator = 2 * d_sigma * w * gap
    same = (gap <= 1e-12 * (dot(va, va) + dot(vb, vb))) | (d_sigma == 0)
    return torch.where(same, 0.5, numerator / torch.where(same, -1.0, denominator))
