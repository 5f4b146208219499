"""Where a run begins when it begins late, in the paper's symbols; free of diffusers.

A noisy sample is x_M = a x_0 + s eps. Of its marginal q_M only E[x_0] and tr Cov[x_0] are known. Among N(m, v I) the one nearest to q_M,

    (m*, v*) = argmin KL(q_M || N(m, v I)) = (a E[x_0],  s^2 + a^2 tr Cov[x_0] / d)                                          (eq. 5)

is "Analytic-Init"; d is the number of elements. It is q_M itself where that is Gaussian with a covariance of c I.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Of clean samples: ``mean`` E[x_0], of one sample's shape, and ``trace`` tr Cov[x_0] / d, 0-dim."""

    mean: Tensor
    trace: Tensor


UNIT = Moments(torch.zeros(()), torch.ones(()))
"""What is taken where nothing was measured."""


class Sums(NamedTuple):
    """Running sums over clean samples, float64: of x_0, of its squares, and how many."""

    total: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def of(cls, x0: Tensor) -> Sums:
        """Of clean samples [batch, ...]."""
        x = x0.detach().cpu().double()
        return cls(x.sum(0), x.square().sum(0), torch.tensor(len(x)))

    def plus(self, other: Sums) -> Sums:
        return Sums(*(mine + its for mine, its in zip(self, other, strict=True)))

    def moments(self) -> Moments:
        """tr Cov / d = mean over the elements of E[x^2] - E[x]^2, as the official code has it: over ``count``, not ``count - 1``."""
        mean = self.total / self.count
        return Moments(mean, (self.squares / self.count - mean.square()).mean().clamp(min=0))


def optimum(moments: Moments, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(m*, v*) of eq. 5, for the signal level ``a`` and the noise level ``s`` (0-dim)."""
    return a * moments.mean, s * s + a * a * moments.trace


def begin(noise: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """x_M = m + sqrt(v) n, of unit noise n [batch, ...]."""
    return m + v.sqrt() * noise


def official_svd(noise: Tensor, init: Tensor | float, moments: Moments) -> Tensor:
    """What the official code of Stable Video Diffusion does, for comparison: its two values change places on the way, and ``init``, the
    scheduler's deviation of the noise, holds a data variance of 1 already where that is sqrt(sigma^2 + 1)."""
    return noise * (init * init + moments.mean).sqrt() + moments.trace


def divergence(mu: Tensor, cov: Tensor, m: Tensor, v: Tensor) -> Tensor:
    """KL(N(mu, cov) || N(m, v I)) in nats: how far a start is from a Gaussian marginal. ``mu``, ``m`` [d], ``cov`` [d, d]."""
    d = len(mu)
    return ((cov.trace() + (mu - m).square().sum()) / v - d + d * v.log() - torch.logdet(cov)) / 2
