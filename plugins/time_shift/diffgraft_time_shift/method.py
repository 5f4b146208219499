"""The mathematics of the Time-Shift Sampler, without diffusers. Symbols as in arXiv 2305.15583.

A noisy sample is ``x_t = sqrt(a) x_0 + sqrt(b) eps`` with signal power ``a(t)`` and noise power ``b(t)``:

    VP:    a = abar_t,         b = 1 - abar_t     (t counts training timesteps 0 ... T-1)
    flow:  a = (1 - s)^2,      b = s^2            (s = t / T)

so a sample of data with variance sigma_d^2 has ``Var(x_t) = a sigma_d^2 + b``. The paper's criterion is the case sigma_d^2 = 0.
Variances are over all dimensions of one sample, never over the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNINFORMATIVE = 0.8
"""sigma_d^2 above which Var(x_t) depends so little on t that its argmin only measures noise (at 1 it is constant for VP)."""


class Levels(NamedTuple):
    """The noise levels of a training schedule: ``abar`` [T] for VP, None for flow; ``steps`` = T."""

    abar: Tensor | None
    steps: int

    def at(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, valid), each shaped like ``tau`` (float, training-timestep units, fractions interpolated).

        ``valid`` is False outside of [0, T-1] (flow: [0, T]), where no network was trained.
        """
        if self.abar is None:
            s = (tau / self.steps).clamp(0, 1)
            return (1 - s) ** 2, s**2, (tau >= 0) & (tau <= self.steps)
        last = self.steps - 1
        low = tau.floor().clamp(0, last).long()
        high = (low + 1).clamp(max=last)
        abar = torch.lerp(self.abar.take(low), self.abar.take(high), (tau - low).clamp(0, 1))  # indexing with a 0-dim tensor would read it
        return abar, 1 - abar, (tau >= 0) & (tau <= last)


def sample_variance(x: Tensor) -> Tensor:
    """v = Var(x), over all non-batch dimensions: [B, ...] -> [B], float32."""
    return x.flatten(1).float().var(dim=1)


def best_offset(v: Tensor, a: Tensor, b: Tensor, valid: Tensor, offsets: Tensor, data_variance: Tensor) -> Tensor:
    """k [B] of ``t_s = t + k = argmin_tau (v - Var_model(tau))^2``, tau over the window.

    v [B] variance of each sample; a, b, valid, offsets [K] the candidates tau = t + offsets; data_variance [B] sigma_d^2.
    """
    model = data_variance[:, None] * a + b
    distance = (v[:, None] - model).square().masked_fill(~valid, torch.inf)
    return offsets[distance.argmin(dim=1)]


def smaller_shift(k_lower: Tensor, k_upper: Tensor) -> Tensor:
    """The smallest shift that every sigma_d^2 between its two bounds supports; 0 where they disagree about the direction.

    ``k_lower`` is the offset under the lower bound of sigma_d^2, ``k_upper`` under the upper one. More data variance explains more of v, so
    k_upper <= k_lower.
    """
    return k_upper.clamp(min=0) + k_lower.clamp(max=0)


def flow_rises(a_edge: Tensor, b_edge: Tensor, data_variance: Tensor) -> Tensor:
    """Whether a flow's Var(x_t) rises with t over the whole window: [B], from a, b at the window's lower edge (0-dim).

    (1-s)^2 sigma_d^2 + s^2 has its minimum at s = sigma_d^2 / (1 + sigma_d^2), that is where sqrt(b) = sigma_d^2 sqrt(a); below it two
    times share one variance. (VP rises everywhere, for sigma_d^2 < 1.)
    """
    return b_edge.sqrt() >= data_variance * a_edge.sqrt()


def data_variance_bounds(m: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(lower, upper) bound of sigma_d^2 from m = Var(E[x_0 | x_t]), the variance of the denoiser's x_0 estimate. All [B]; a, b 0-dim.

    By the law of total variance sigma_d^2 = m + mmse, so m is a lower bound. Of all data with variance sigma_d^2 the white Gaussian has the
    largest mmse, sigma_d^2 b / (a sigma_d^2 + b), so m >= a sigma_d^4 / (a sigma_d^2 + b); solved for sigma_d^2 that is the upper bound,
    an equality for white Gaussian data. Both close on sigma_d^2 as b/a -> 0. Neither uses v, so a drift of v is not taken for data.
    """
    return m, m / 2 + (m**2 / 4 + m * b / a).sqrt()
