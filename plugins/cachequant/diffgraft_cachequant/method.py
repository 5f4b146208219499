"""The equations of CacheQuant (arXiv 2503.01323), without a model.

Symbols: F_i the feature that is cached, as U-Net call i of T has it; N the interval; a and b the correction, one of each for a channel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 1e-12
"""Of the squared mean: a channel whose variance is less is constant up to rounding."""


# the schedule: DPS ------------------------------------------------------------------------------------------------------------------


def group_cost(distance: Tensor, start: int, length: int) -> float:
    """sum_i ||F_i - F_start||_1 over the calls start <= i < start + length: what they lose where all use F_start.

    Args:
        distance: [T, W], ||F_i - F_(i-k)||_1 at [i, k - 1].
    """
    return math.fsum(float(distance[start + k, k - 1]) for k in range(1, length))


def lengths(calls: int, interval: int) -> range:
    """How long a group of calls may be: ceil(N / 2) to 2 N, fewer where there are fewer calls."""
    return range(min(math.ceil(interval / 2), calls), min(2 * interval, calls) + 1)


def best_schedule(distance: Tensor, interval: int) -> tuple[int, ...]:
    """The first calls of the K = ceil(T / N) groups of calls in a row whose costs sum to the least, found by dynamic programming:

        L(n, k) = min over j of L(j, k - 1) + cost(j .. n - 1),     L(0, 0) = 0

    Args:
        distance: as in :func:`group_cost`, on the CPU, W >= 2 N - 1 or T - 1.
    """
    T = len(distance)
    K, allowed = math.ceil(T / interval), lengths(T, interval)
    costs = {(j, length): group_cost(distance, j, length) for j in range(T) for length in allowed if j + length <= T}
    best: dict[tuple[int, int], tuple[float, int]] = {(0, 0): (0.0, 0)}
    for k in range(1, K + 1):
        for n in range(1, T + 1):
            ways = [(best[n - m, k - 1][0] + costs[n - m, m], n - m) for m in allowed if (n - m, k - 1) in best]
            if ways:
                best[n, k] = min(ways)
    keys, n = [], T
    for k in range(K, 0, -1):
        n = best[n, k][1]
        keys.append(n)
    return tuple(reversed(keys))


# the correction: DEC ----------------------------------------------------------------------------------------------------------------


def moments(x: Tensor, y: Tensor, axis: int = 1) -> Tensor:
    """[5, C], float32: n, mean x, mean y, sum (x - mean x)^2 and sum (x - mean x)(y - mean y) over all axes but that of the channels."""
    x, y = (z.float().movedim(axis, -1).flatten(0, -2) for z in (x, y))
    mx, my = x.mean(0), y.mean(0)
    return torch.stack([torch.full_like(mx, len(x)), mx, my, (x - mx).pow(2).sum(0), ((x - mx) * (y - my)).sum(0)])


def merged(one: Tensor, other: Tensor) -> Tensor:
    """The moments [5, ...] of both sets together (Chan, Golub and LeVeque 1979); n = 0 is an empty one."""
    n, m = one[0] + other[0], other[0] / (one[0] + other[0]).clamp(min=1)
    dx, dy = other[1] - one[1], other[2] - one[2]
    both = one[0] * m
    return torch.stack([n, one[1] + m * dx, one[2] + m * dy, one[3] + other[3] + both * dx * dx, one[4] + other[4] + both * dx * dy])


def affine(found: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of y = a x + b by least squares, each [..., C]:

        a = cov(x, y) / var(x),     b = mean(y) - a mean(x)

    Where x is constant, a = 1; where there is nothing, b = 0 too.

    Args:
        found: [5, ..., C], :func:`moments`.
    """
    n, mx, my, sxx, sxy = found.double()
    known = sxx > LEAST * n * mx * mx
    a = torch.where(known, sxy / torch.where(known, sxx, 1.0), 1.0)
    return a.float(), torch.where(n > 0, my - a * mx, 0.0).float()


def corrected(x: Tensor, a: Tensor, b: Tensor, axis: int = 1) -> Tensor:
    """a x + b in x's dtype, computed in float32; a and b are [C]."""
    shape = [1] * x.ndim
    shape[axis] = -1
    return torch.addcmul(b.view(shape), x.float(), a.view(shape)).to(x.dtype)
