"""DPM-Solver-v3 in the paper's symbols (Zheng, Lu, Chen, Zhu, arXiv 2310.13268); free of diffusers.

A sample x = alpha x0 + sigma eps lies at lambda = log(alpha / sigma). With empirical model statistics l, s, b, functions of lambda,

    f = N / alpha = (sigma eps_theta - l x) / alpha = (1 - l) x / alpha - x0_theta                 N = sigma eps_theta - l x
    g = e^{-int s} f - int e^{-int s} b                                          (integrals from lambda_s, the "base" of g)

and y = x / alpha solves the diffusion ODE exactly as

    y_t = A (y_s - int E B - int E g),    A = e^{-int l},  E = e^{int (l + s)},  B = int e^{-int s} b

of which only g has to be approximated, by its Taylor polynomial in lambda at lambda_s. f is computed from x0_theta: near pure noise, where
alpha is tiny, sigma eps - l x is a difference of two numbers that are nearly equal. (Sections of the paper are named where they are
known; its equation numbers were not at hand.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffgraft.methods.noise_schedule import Array
from torch import Tensor


def snapped(lam: Array, grid: Array) -> list[int]:
    """Indices of the grid points next to ``lam`` (falling noise); steps that would end where they began are moved to the next points.

    Raises:
        ValueError: the grid has fewer intervals than there are steps.
    """
    last = len(grid) - 1
    if len(lam) > len(grid):
        raise ValueError(f"intervals = {last}: {len(lam) - 1} steps do not fit into {last} intervals of lambda; give more intervals")
    index = np.rint((lam.clip(grid[0], grid[-1]) - grid[0]) / (grid[-1] - grid[0]) * last).astype(int).clip(0, last)
    n = len(index)
    rising = np.maximum.accumulate(index - np.arange(n)) + np.arange(n)
    room = last - (n - 1) + np.arange(n)
    return [int(i) for i in np.minimum(rising, room)]


# one step -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transition:
    """What l, s, b make of the way from lambda_s to lambda_t; each [...] like one sample, or smaller and broadcasting.

    A   e^{-int l}
    D   e^{int s}: moves the base of g
    B   int e^{-int s} b, at lambda_t
    EB  int E B
    E   int E (lambda - lambda_s)^k / k!, for k = 0, 1, ...
    h   lambda_t - lambda_s
    """

    A: Tensor
    D: Tensor
    B: Tensor
    EB: Tensor
    E: tuple[Tensor, ...]
    h: float

    def to(self, device: torch.device, dtype: torch.dtype) -> Transition:
        """A copy for samples of this kind."""
        A, D, B, EB, *E = (x.to(device, dtype) for x in (self.A, self.D, self.B, self.EB, *self.E))
        return Transition(A, D, B, EB, tuple(E), self.h)


def cumulative(values: Tensor, step: float) -> Tensor:
    """The trapezoid rule's integral up to each point of an even grid; [n, ...] -> [n, ...], the first one 0."""
    areas = (values[1:] + values[:-1]) * (0.5 * step)
    return torch.cat([torch.zeros_like(values[:1]), areas.cumsum(0)])


def transition(lam: Array, l: Tensor, s: Tensor, b: Tensor, terms: int) -> Transition:  # noqa: E741  # the paper's l
    """The transition over a part of the grid, by the trapezoid rule, as in the official code.

    Args:
        lam: the part's points [n], from lambda_s to lambda_t.
        l, s, b: statistics there [n, ...].
        terms: how many powers of (lambda - lambda_s) are integrated, which is the highest order.
    """
    step = float(lam[1] - lam[0])
    L, S = cumulative(l, step), cumulative(s, step)
    B = cumulative((-S).exp() * b, step)
    E = (L + S).exp()
    since = torch.as_tensor(lam - lam[0], dtype=l.dtype, device=l.device).reshape(-1, *[1] * (l.ndim - 1))
    powers = tuple(cumulative(E * since**k / math.factorial(k), step)[-1] for k in range(terms))
    return Transition((-L[-1]).exp(), S[-1].exp(), B[-1], cumulative(E * B, step)[-1], powers, float(lam[-1] - lam[0]))


def derivative_weights(lam: Sequence[float], pseudo: bool) -> Array:
    """w with g^(k)(lambda_0) = sum_j w[k - 1, j] g(lambda_j), for k = 1 ... n, from n + 1 points.

    Not ``pseudo``: of the polynomial through all points (a Vandermonde system). ``pseudo``: the recurrence
    D_l^(k) = (D_{l+1}^(k-1) - D_l^(k-1)) / (lambda_{l+k} - lambda_l), g^(k) = k! D_0^(k), so that g^(k) uses k + 1 points only.
    """
    nodes, n = np.asarray(lam, dtype=np.float64), len(lam) - 1
    factorials = np.array([math.factorial(k) for k in range(1, n + 1)], dtype=np.float64)[:, None]
    if pseudo:
        D, rows = np.eye(n + 1), []
        for k in range(1, n + 1):
            D = (D[1:] - D[:-1]) / (nodes[k:] - nodes[: n + 1 - k])[:, None]
            rows.append(D[0])
        return np.asarray(factorials * np.stack(rows)) if rows else np.zeros((0, 1))
    R = (nodes[1:, None] - nodes[0]) ** np.arange(1, n + 1)
    inverse = np.linalg.inv(R) if n else np.zeros((0, 0))
    return factorials * np.concatenate([-inverse.sum(1, keepdims=True), inverse], axis=1)


def derivatives(g: Sequence[Tensor], lam: Sequence[float], pseudo: bool) -> list[Tensor]:
    """[g, g', g'', ...] at the first point, from values at all."""
    rows = derivative_weights(lam, pseudo).tolist()
    return [g[0], *(sum((w * each for w, each in zip(row, g, strict=True)), torch.zeros_like(g[0])) for row in rows)]


def advance(y: Tensor, taylor: Sequence[Tensor], over: Transition) -> Tensor:
    """y_t from y_s and the derivatives of g at lambda_s (the corrector is the same with g_t among the points)."""
    out = y - over.EB
    for derivative, weight in zip(taylor, over.E, strict=False):
        out = out - weight * derivative
    return over.A * out


def seen_from_start(f: Tensor, over: Transition) -> Tensor:
    """g_t with base lambda_s, of f_t."""
    return f / over.D - over.B


def seen_from_end(g: Tensor, over: Transition) -> Tensor:
    """g with base lambda_t, of g with base lambda_s."""
    return over.D * (g + over.B)


# empirical model statistics -------------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of samples at one lambda, elementwise means and central second moments of

    d = -x0_theta;  q = x / alpha;  r = e^{-lambda} eps' = the derivative of -x0_theta along the ODE;  m = 1 - (sigma J_eps v) v
    """

    m: Tensor
    d: Tensor
    q: Tensor
    r: Tensor
    dd: Tensor
    dq: Tensor
    qq: Tensor
    dr: Tensor
    qr: Tensor


def moments(m: Tensor, d: Tensor, q: Tensor, r: Tensor, over: Sequence[int]) -> Moments:
    """Moments over the axes ``over`` of samples [batch, ...], which stay as axes of size 1; float64."""
    m, d, q, r = (x.double() for x in (m, d, q, r))
    means = [x.mean(list(over), keepdim=True) for x in (m, d, q, r)]
    cd, cq, cr = (x - mean for x, mean in zip((d, q, r), means[1:], strict=True))
    return Moments(*means, *((a * b).mean(list(over), keepdim=True) for a, b in ((cd, cd), (cd, cq), (cq, cq), (cd, cr), (cq, cr))))


def pooled(sets: Sequence[Moments]) -> Moments:
    """The moments of several sets of equally many samples together."""
    d, q, r = (torch.stack([each[i] for each in sets]) for i in (1, 2, 3))
    mean = Moments(*(torch.stack(column).mean(0) for column in zip(*sets, strict=True)))
    cd, cq, cr = (x - x.mean(0) for x in (d, q, r))
    between = [(a * b).mean(0) for a, b in ((cd, cd), (cd, cq), (cq, cq), (cd, cr), (cq, cr))]
    return Moments(*mean[:4], *(within + more for within, more in zip(mean[4:], between, strict=True)))


FLAT = 1e-5
"""Var(f) / (Var(x0_theta) + m^2 Var(x / alpha)) below which f is constant (Gaussian data) or rounding, and s is set to 0."""


def statistics(lam: Array, at: Moments) -> tuple[Tensor, Tensor, Tensor]:
    """l, s, b [N + 1, ...] of moments on the grid [N + 1, ...] (Appendix C.1.1).

    l = E[(sigma J_eps v) v] minimises the expected Frobenius norm of sigma J_eps - diag(l); with l' by finite differences
    f' = e^{-lambda} ((l - 1) eps + eps') - l' x / alpha, and s = Cov(f, f') / Var(f), b = E f' - s E f minimise E |f' - s f - b|^2.
    In terms of the moments, with m = 1 - l:  f = d + m q  and  f' = r - m d - (m + l') q.
    """
    m, d, q, r, dd, dq, qq, dr, qr = at
    step = float(lam[1] - lam[0])
    k = -(m - torch.gradient(m, spacing=step, dim=0)[0])  # -(m + l'), as l' = -m'
    variance = dd + 2 * m * dq + m * m * qq
    covariance = dr - m * dd + k * dq + m * (qr - m * dq + k * qq)
    s = torch.where(variance > FLAT * (dd + m * m * qq), covariance / variance.clamp_min(torch.finfo(variance.dtype).tiny), 0.0)
    b = r - m * d + k * q - s * (d + m * q)
    return 1 - m, s, b
