"""Phased DMD's formulas (Fan et al., arXiv 2510.27684) for flow models, in the paper's symbols; free of diffusers.

A noisy sample is ``x_t = (1 - t) x_0 + t eps``. Phases end at ``1 = t_0 > t_1 > ... > t_K = 0``; expert k carries samples from level
t_{k-1} to level s = t_k, so its output is x_s, clean in the last phase alone. Noise is put on x_s, not on x_0:

    x_t = a x_s + b eps,    a = (1 - t) / (1 - s),    b^2 = t^2 - a^2 s^2,    s < t <= 1

and the score of p(x_t) is what a model learns whose target score is -eps / b. At s = 0 all of it is plain DMD.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SAME = 5e-4
"""Levels nearer than this are one: half a training timestep of 1,000."""
SHIFTS = {"wan2.2-lightning": 5.0, "qwen-image-lightning": 3.0}
"""Shifts of published models of four steps (Qwen-Image's as exp(mu), mu = ln 3, which is the same formula)."""


def shifted(levels: Sequence[float], shift: float) -> list[float]:
    """Of each level u: shift u / (1 + (shift - 1) u)."""
    return [shift * u / (1 + (shift - 1) * u) for u in levels]


def evenly(steps: int) -> list[float]:
    """Levels 1, 1 - 1/N, ..., 1/N, where the N steps begin."""
    return [1 - i / steps for i in range(steps)]


def phase_of(level: float, boundaries: Sequence[float]) -> int:
    """The number, from 0, of the phase that a step from ``level`` belongs to: k - 1 where t_{k-1} >= level > t_k.

    Args:
        boundaries: t_1 > ... > t_{K-1}.
    """
    return sum(level <= t + SAME for t in boundaries)


def between(t: Tensor, s: float) -> tuple[Tensor, Tensor]:
    """(a, b) of x_t = a x_s + b eps, like ``t``; computed in float64."""
    wide = t.double()
    a = (1 - wide) / (1 - s)
    b = (wide.square() - (a * s).square()).clamp(min=0).sqrt()
    return a.to(t.dtype), b.to(t.dtype)


def velocity_target(x_s: Tensor, eps: Tensor, t: Tensor, s: float) -> Tensor:
    """v* = -(x_t - t eps / b) / (1 - t): the velocity whose score is -eps / b. Written so that it is finite at t = 1; eps - x_0 at s = 0.

    Args:
        t: [batch, 1, ...], above s.
    """
    _, b = between(t, s)
    return (t + (1 - t) * (s / (1 - s)) ** 2) / b * eps - x_s / (1 - s)


def score(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Of p(x_t), by a velocity: -(x_t + (1 - t) v) / t."""
    return -(x_t + (1 - t) * v) / t


def phase_estimate(x_t: Tensor, v: Tensor, t: Tensor, s: float) -> Tensor:
    """E[x_s | x_t] by Tweedie's formula, (x_t + b^2 score) / a: what x_0's estimate, x_t - t v, is in the last phase."""
    a, b = between(t, s)
    return (x_t + b.square() * score(x_t, v, t)) / a


def weight(t: Tensor, s: float, largest: float) -> Tensor:
    """Of the fake's squared error in v: clamp(1 / b^2, 0, largest) b^2, so that it does not explode at t -> s; 1 in the last phase."""
    if s == 0:
        return torch.ones_like(t)
    _, b = between(t, s)
    return (largest * b.square()).clamp(max=1)


def euler(x: Tensor, v: Tensor, t: float, after: float) -> Tensor:
    """x + (t' - t) v."""
    return x + (after - t) * v


def renoised(x: Tensor, v: Tensor, t: float | Tensor, after: float | Tensor, eps: Tensor) -> Tensor:
    """The estimate of x_0, x - t v, with fresh noise at the next level: (1 - t') x_0 + t' eps."""
    return (1 - after) * (x - t * v) + after * eps
