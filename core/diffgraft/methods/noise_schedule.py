"""A model's noise levels by their half log-SNR, for solvers that step in it.

A sample x = alpha x0 + sigma eps lies at lambda = log(alpha / sigma). Solvers of the DPM family plan in lambda and tell the denoiser the
timestep that belongs to it, which need not be a whole number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


class Level(NamedTuple):
    """Signal level alpha, noise level sigma and half log-SNR lam of a sample."""

    alpha: float
    sigma: float
    lam: float


@dataclass(frozen=True)
class NoiseSchedule:
    """lambda as a function of the denoiser's timestep, and back.

    steps      number of training timesteps T
    log_alpha  log alpha_t at t = 0 ... T - 1 of a variance-preserving model, linear in between (as the official code of DPM-Solver has it);
               None: flow matching, alpha = 1 - sigma, t = T sigma
    """

    steps: int
    log_alpha: Array | None = None

    FLOW_ENDS = (0.999, 0.001)
    """sigma between which a flow model is solved: lambda is infinite at 1 and 0."""

    @classmethod
    def of_alphas(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """Of a discrete variance-preserving schedule [T]; a terminal SNR of 0 is raised to 2^-24, as diffusers does."""
        abar = alphas_cumprod.double().clamp_min(2.0**-24).numpy()
        return cls(len(abar), 0.5 * np.log(abar))

    def lam(self, t: Array) -> Array:
        """lambda at timesteps (any real number in the range)."""
        if self.log_alpha is None:
            sigma = np.clip(t / self.steps, self.FLOW_ENDS[1], self.FLOW_ENDS[0])
            return np.log1p(-sigma) - np.log(sigma)
        log_alpha = np.interp(t, np.arange(self.steps), self.log_alpha)
        return log_alpha - 0.5 * np.log(-np.expm1(2 * log_alpha))

    def t(self, lam: Array) -> Array:
        """The timestep at which the denoiser sees lambda."""
        if self.log_alpha is None:
            return self.steps / (1 + np.exp(lam))
        log_alpha = -0.5 * np.logaddexp(0.0, -2 * lam)
        return np.interp(log_alpha, self.log_alpha[::-1], np.arange(self.steps)[::-1])

    def level(self, lam: float) -> Level:
        """alpha and sigma at lambda."""
        if self.log_alpha is None:
            return Level(1 / (1 + math.exp(-lam)), 1 / (1 + math.exp(lam)), lam)
        return Level(1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam)), lam)

    @property
    def ends(self) -> tuple[float, float]:
        """(lambda_T, lambda_0): where sampling begins and ends."""
        first, last = self.lam(np.array([self.steps - 1.0 if self.log_alpha is not None else float(self.steps), 0.0]))
        return float(first), float(last)

    def grid(self, intervals: int) -> Array:
        """lambda_T ... lambda_0 in equal intervals [intervals + 1]."""
        return np.linspace(*self.ends, intervals + 1)


@dataclass(frozen=True)
class DeviceSchedule:
    """The same for tensors of lambda on a device: a solver that chooses its steps there asks it without waiting.

    steps      number of training timesteps T
    log_alpha  [T], rising (t = T - 1 ... 0), float64 where the device has it; None: flow matching
    """

    steps: int
    log_alpha: Tensor | None = None

    @classmethod
    def of(cls, schedule: NoiseSchedule, device: torch.device) -> DeviceSchedule:
        """``schedule`` on a device."""
        if schedule.log_alpha is None:
            return cls(schedule.steps)
        return cls(schedule.steps, torch.from_numpy(schedule.log_alpha[::-1].copy()).to(device, precise(device)))

    def t(self, lam: Tensor) -> Tensor:
        """The timesteps at which the denoiser sees lambda [n]."""
        if self.log_alpha is None:
            return self.steps * torch.sigmoid(-lam)
        table = self.log_alpha
        log_alpha = (-0.5 * torch.nn.functional.softplus(-2 * lam)).clamp(table[0], table[-1])
        low = (torch.searchsorted(table, log_alpha, right=True) - 1).clamp(0, len(table) - 2)
        part = (log_alpha - table[low]) / (table[low + 1] - table[low])
        return (self.steps - 1) - (low + part)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at timesteps [n]."""
        if self.log_alpha is None:
            sigma = t.float() / self.steps
            return 1 - sigma, sigma
        place = (self.steps - 1 - t.to(self.log_alpha.dtype)).clamp(0, self.steps - 1)
        low = place.long().clamp(max=self.steps - 2)
        log_alpha = torch.lerp(self.log_alpha[low], self.log_alpha[low + 1], place - low)
        return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()

    def levels(self, lam: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at lambda [n]."""
        if self.log_alpha is None:
            return torch.sigmoid(lam), torch.sigmoid(-lam)
        return torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt()


def precise(device: torch.device) -> torch.dtype:
    """float64, or what a device without it has."""
    return torch.float32 if device.type == "mps" else torch.float64


def spaced(schedule: NoiseSchedule, n: int, spacing: str) -> Array:
    """lambda of the n + 1 ends of n steps.

    Args:
        spacing: "time" (uniform t), "quadratic" (uniform sqrt t), "logsnr" (uniform lambda) or "edm" (Karras et al., rho = 7).
    """
    first, last = schedule.ends
    if spacing == "logsnr":
        return np.linspace(first, last, n + 1)
    if spacing == "edm":
        return -7 * np.log(np.linspace(math.exp(-first / 7), math.exp(-last / 7), n + 1))
    shift = 0.0 if schedule.log_alpha is None else 1.0  # t in (0, 1] is (timestep + 1) / T of a discrete model
    ends = schedule.t(np.array([first, last])) + shift
    power = 1.0 if spacing == "time" else 2.0
    begin, end = (float(each) ** (1 / power) for each in ends)
    return schedule.lam(np.linspace(begin, end, n + 1) ** power - shift)


def clean(x: Tensor, output: Tensor, at: Any, kind: str) -> Tensor:
    """x0 that the denoiser's ``output`` implies for ``x``.

    Args:
        at: has ``alpha`` and ``sigma`` (:class:`Level`, or tensors that broadcast to ``x``).
        kind: "epsilon", "v_prediction", "sample" or "flow_prediction" (output = eps - x0).
    """
    if kind == "epsilon":
        return (x - at.sigma * output) / at.alpha  # type: ignore[no-any-return]
    if kind == "v_prediction":
        return at.alpha * x - at.sigma * output  # type: ignore[no-any-return]
    if kind == "flow_prediction":
        return x - at.sigma * output  # type: ignore[no-any-return]
    return output
