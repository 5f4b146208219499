"""Superposition of diffusion models with the Ito density estimator, in the paper's symbols; free of diffusers.

Variance-exploding form: x = x0 + sigma eps, sigma falling to sigma'; v_i = E[eps | x] of model (or prompt) i, g_i the prediction that a
pipeline makes of it (guidance done). A step is dx = A g + B z, and what it changes of a log-density has one form for all kinds of steps:

    d log q_i = -P |v_i|^2 - Q <dx, v_i> + H div v_i + (terms that are the same for every i)

All sums run over everything but the batch, in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Float = Tensor | float


class Move(NamedTuple):
    """The coefficients of one step (0-dim): ``drift`` A, ``spread`` B, ``square`` P, ``cross`` Q, ``divergence`` H.

    ``radius`` and ``growth`` are those of the terms that are the same for every i: -radius |dx|^2 + growth dim x.
    """

    drift: Tensor
    spread: Tensor
    square: Tensor
    cross: Tensor
    divergence: Float = 0.0
    radius: Float = 0.0
    growth: Float = 0.0


def euler_maruyama(sigma: Tensor, after: Tensor) -> Move:
    """The paper's step (theorem 1): dx = 2 d sigma g + sqrt(2 |d sigma| sigma) z; the divergences of the general form cancel."""
    d = after - sigma
    return Move(2 * d, (2 * d.abs() * sigma).sqrt(), d.abs() / sigma, 1 / sigma)


def transition(sigma: Tensor, after: Tensor) -> Move:
    """The same SDE over an interval of any length: exact where x0 = x - sigma g does not change in it (the step of DDPM).

    log q_i changes by log p_i(x' | x) - log p(x | x'), p_i the Gaussian whose mean v_i gives and p the noising from sigma' to sigma: of
    first order in d sigma the same as theorem 1.
    """
    D = sigma**2 - after**2
    return Move(-D / sigma, after * D.sqrt() / sigma, D / (2 * after**2), sigma / after**2, 0.0, 1 / (2 * after**2), (sigma / after).log())


def sde(sigma: Tensor, after: Tensor) -> Move:
    """The paper's step where it can be taken, else the transition.

    On data of variance V the explicit step misses the variance V + sigma'^2 by a share of at most 3 (d sigma)^2 / (V + sigma'^2). It is
    taken where that is below 3/4 for V = 1/4 and more. What lies beyond is the first interval of a flow model, where sigma falls from
    infinity, and the first and last ones of few steps.
    """
    fine = (sigma - after) ** 2 <= 0.25 * (0.25 + after**2)
    explicit, exact = euler_maruyama(sigma, after), transition(sigma, after)
    return Move(*(torch.where(fine, one, other) for one, other in zip(explicit, exact, strict=True)))


def to_clean(sigma: Tensor) -> Move:
    """The last step, to x0 = x - sigma g: the transition's limit, up to a factor that P and Q share.

    No density is left to follow in it. That both change alike says that x0 is as far from x - sigma v_a as from x - sigma v_b.
    """
    return Move(-sigma, torch.zeros_like(sigma), torch.full_like(sigma, 0.5), 1 / sigma)


def ode(sigma: Tensor, after: Tensor) -> Move:
    """The probability-flow ODE, dx = d sigma g, along which the divergences stay (proposition of the ODE form)."""
    d = after - sigma
    return Move(d, torch.zeros_like(d), d.abs() / sigma, 1 / sigma, d.abs())


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample [batch]."""
    return (a.double() * b.double()).flatten(1).sum(1)


def density_change(v: Tensor, dx: Tensor, move: Move, divergence: Float = 0.0, sign: int = 1) -> Tensor:
    """d log q(x) of one model along a step [batch].

    Args:
        divergence: div v [batch], of the ODE form.
        sign: -1 is that of the official OR code in front of |v|^2, which is wrong.
    """
    change = -sign * move.square * dot(v, v) - move.cross * dot(dx, v) + move.divergence * divergence
    return change - move.radius * dot(dx, dx) + move.growth * v[0].numel()


def guided(v0: Tensor, v: Tensor, w: float) -> Tensor:
    """g = v_0 + w (v - v_0)."""
    return v0 + w * (v - v0)


def mixture(ga: Tensor, gb: Tensor, kappa: Tensor) -> Tensor:
    """g_b + kappa (g_a - g_b), kappa [batch]."""
    return gb + kappa.to(gb.dtype).view(-1, *[1] * (gb.ndim - 1)) * (ga - gb)


def kappa_or(log_qa: Tensor, log_qb: Tensor, temperature: float, bias: float) -> Tensor:
    """Weight of a when either will do: softmax over T (log q_a + l) and T log q_b [batch]."""
    return torch.sigmoid(temperature * (log_qa + bias - log_qb))


def kappa_and(
    va: Tensor,
    vb: Tensor,
    ga: Tensor,
    gb: Tensor,
    noise: Tensor,
    move: Move,
    gain: float = 0.0,
    divergences: tuple[Float, Float] = (0.0, 0.0),
) -> Tensor:
    """Weight of a at which log q_a changes in this step by ``gain`` more than log q_b [batch].

    1/2 where a and b agree, and in a step that goes nowhere (PNDM repeats a timestep).

    Args:
        noise: the step's noise B z, the same as in the step itself.
        divergences: div v_a, div v_b [batch], of the ODE form.
    """
    apart = va - vb
    kept = dot(move.drift * gb + noise, apart)
    numerator = -move.square * dot(apart, va + vb) - move.cross * kept + move.divergence * (divergences[0] - divergences[1]) - gain
    per_kappa = dot(ga - gb, apart)
    denominator = move.cross * move.drift * per_kappa
    same = (per_kappa.abs() <= 1e-12 * (dot(va, va) + dot(vb, vb))) | (move.drift == 0)
    return torch.where(same, 0.5, numerator / torch.where(same, -1.0, denominator))
