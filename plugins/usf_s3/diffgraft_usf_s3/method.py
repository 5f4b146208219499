"""One step of the unified sampling framework, in the paper's symbols; free of diffusers and torch.

A sample x = alpha x0 + sigma eps lies at lambda = log(alpha / sigma). Between lambda_s and lambda_t, h = lambda_t - lambda_s, the diffusion
ODE is solved exactly by (semi-linear form, eps or x0 being what the model predicts)

    x_t = alpha_t / alpha_s x_s - sigma_t  int_{lambda_s}^{lambda_t} e^{lambda_t - lambda} eps(lambda) dlambda
    x_t = sigma_t / sigma_s x_s + alpha_t  int_{lambda_s}^{lambda_t} e^{lambda - lambda_t} x0(lambda)  dlambda

and with the Taylor polynomial of order n - 1 at lambda_s in the place of the model's prediction m by

    eps:  x_t = alpha_t / alpha_s x_s - sigma_t sum_{i < n} h^{i+1} phi_i(h)  m^(i)
    x0:   x_t = sigma_t / sigma_s x_s + alpha_t sum_{i < n} h^{i+1} phi_i(-h) m^(i)

    phi_0(z) = (e^z - 1) / z,    phi_{i+1}(z) = (phi_i(z) - 1 / (i+1)!) / z

The derivatives m^(i) are "Taylor differences" of the values at other points ("active points"): m^(i) = sum_k a_k (m_k - m_s) with the a
that solves sum_k a_k (lambda_k - lambda_s)^j / j! = delta_ij. All of it is linear in the state and the values, so a step is one list of
numbers (:class:`Update`), made in float64 before the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Kind = Literal["eps", "x0"]
Relax = Literal["dpm2", "bh1", "bh2", "exp+", "exp-"]

NEAREST = 1e-6
"""A flow model's first state is pure noise: lambda = -inf. It is taken for one of this signal level."""


class Level(NamedTuple):
    """Signal level alpha and noise level sigma of a sample."""

    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        """lambda; infinite without noise."""
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


CLEAN = Level(1.0, 0.0)


@dataclass(frozen=True)
class NoiseSchedule:
    """What a sample holds at a timestep.

    steps      number of training timesteps T
    log_alpha  log alpha_t at t = 0 ... T - 1 of a variance-preserving model, linear in between; None: flow matching, sigma = t / T
    """

    steps: int
    log_alpha: Array | None = None

    @property
    def flow(self) -> bool:
        """Whether alpha = 1 - sigma."""
        return self.log_alpha is None

    @property
    def last(self) -> float:
        """The largest timestep."""
        return float(self.steps if self.log_alpha is None else self.steps - 1)

    def level(self, t: float) -> Level:
        """alpha and sigma at a timestep, which need not be a whole number."""
        if self.log_alpha is None:
            sigma = min(t / self.steps, 1 - NEAREST)
            return Level(1 - sigma, sigma)
        log_alpha = float(np.interp(t, np.arange(self.steps), self.log_alpha))
        return Level(math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))

    def t(self, lam: float) -> float:
        """The timestep at which the denoiser sees lambda; the ends of the training beyond it."""
        if self.log_alpha is None:
            return self.steps / (1 + math.exp(lam))
        log_alpha = -0.5 * float(np.logaddexp(0.0, -2 * lam))
        return float(np.interp(log_alpha, self.log_alpha[::-1], np.arange(self.steps)[::-1]))


def phi(i: int, z: float) -> float:
    """phi_i(z); by its series sum_j z^j / (i + 1 + j)! where the recursion would cancel."""
    if abs(z) < 1:
        return math.fsum(z**j / math.factorial(i + 1 + j) for j in range(20))
    value = math.expm1(z) / z
    for j in range(1, i + 1):
        value = (value - 1 / math.factorial(j)) / z
    return value


def differences(lam: Sequence[float], lam_s: float, i: int) -> list[float]:
    """a with m^(i) = sum_k a_k (m_k - m_s), exact for polynomials of as high a degree as there are points.

    Args:
        lam: lambda of the active points [n], n >= i, all different and none ``lam_s``.
    """
    n = len(lam)
    away = np.asarray(lam, dtype=np.float64) - lam_s
    scale = float(np.abs(away).max())  # of the columns' powers: the system stays well-conditioned for short steps
    V = np.stack([(away / scale) ** j / math.factorial(j) for j in range(1, n + 1)])
    unit = np.zeros(n)
    unit[i - 1] = scale**-i
    return [float(a) for a in np.linalg.solve(V, unit)]


def relaxation(relax: Relax | float | None, h: float, kind: Kind) -> float:
    """The factor 1 + O(h) of the first derivative.

    "dpm2" and "bh2" (the same): 0.5 z (e^z - 1) / (e^z - 1 - z); "bh1": 0.5 z^2 / (e^z - 1 - z); "exp+", "exp-": 1 +- 0.5 (e^z - 1), with
    z = h for eps and -h for x0; a number c: 1 + c h.
    """
    if relax is None:
        return 1.0
    if not isinstance(relax, str):
        return 1 + relax * h
    z = h if kind == "eps" else -h
    if relax in ("dpm2", "bh2"):
        return 0.5 * phi(0, z) / phi(1, z)
    if relax == "bh1":
        return 0.5 / phi(1, z)
    return 1 + (0.5 if relax == "exp+" else -0.5) * math.expm1(z)


@dataclass(frozen=True)
class Update:
    """x_t = base x[start] + sum of weight m[index] over (index, weight); indices count from the newest, -1."""

    kind: Kind
    start: int
    base: float
    weights: tuple[tuple[int, float], ...]


def update(
    past: Sequence[Level], target: Level, kind: Kind, points: Sequence[Sequence[int]], start: int = -1, relax: Relax | float | None = None
) -> Update:
    """The step from ``past[start]`` to ``target``.

    Args:
        past: levels at which values of the model are known, the newest last.
        points: active points of each derivative, [n - 1] lists of indices into ``past``; no list is order n = 1, which is DDIM.
        relax: see :func:`relaxation`.

    The part of order 1 is written without lambda, so that it holds at the ends of a schedule too.
    """
    s = past[start]
    if kind == "eps":
        base, outer = target.alpha / s.alpha, -target.sigma
        weights = {start: -(target.alpha / s.alpha * s.sigma - target.sigma)}
    else:
        base, outer = target.sigma / s.sigma, target.alpha
        weights = {start: target.alpha - target.sigma / s.sigma * s.alpha}
    h = target.lam - s.lam
    for i, active in enumerate(points, 1):
        moment = outer * h ** (i + 1) * phi(i, h if kind == "eps" else -h)
        if i == 1:
            moment *= relaxation(relax, h, kind)
        for k, a in zip(active, differences([past[k].lam for k in active], s.lam, i), strict=True):
            weights[k] = weights.get(k, 0.0) + moment * a
            weights[start] -= moment * a
    return Update(kind, start, base, tuple(sorted(weights.items(), reverse=True)))
