"""The equations of ZOODiP (arXiv 2503.14868), without a model.

Symbols: e the token's row [d], L the loss, mu the size of a perturbation, z its direction, n how many; g the estimated gradient; tau the
length of the history, nu the share of its variance that does not count, V [k, d] the directions in which it hardly moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def estimate(loss: Callable[[Tensor], Tensor], e: Tensor, z: Tensor, mu: float) -> tuple[Tensor, Tensor]:
    """(sum_i (L(e + mu z_i) - L(e)) / mu z_i / n, L(e)): the gradient of L smoothed over a Gaussian, by forward differences.

    Args:
        loss: rows [k, d] -> L of each [k, samples], on the same data and noise for all; the differences are of the mean over the samples.
        z: [n, d], standard normal.
    """
    here, *there = loss(torch.cat([e[None], e + mu * z]))
    slopes = torch.stack([(each.mean() - here.mean()) / mu for each in there])
    return (slopes[:, None] * z).mean(0), here


def shrink(n: int, d: int) -> float:
    """1 / sqrt((d + n - 1) / n), by which an estimate of n directions in d dimensions is too long: the root of its expected squared norm by
    the gradient's, for directions of length sqrt(d)."""
    return 1 / math.sqrt((d + n - 1) / n)


def projected(g: Tensor, V: Tensor) -> Tensor:
    """g - g V^T V: what of g is orthogonal to the rows of V, which are orthonormal (rows of zeros do nothing)."""
    return g - (g @ V.T) @ V


def still_directions(history: Tensor, nu: float) -> Tensor:
    """V [k, d], float32: the principal directions of the standardised history behind those that hold more than 1 - nu of its variance.

    Args:
        history: [tau, d], rows that the token has had.
        nu: 0 to 1; 0 gives none.
    """
    x = history.double()
    spread = x.std(0, correction=0)
    x = (x - x.mean(0)) / torch.where(spread > 0, spread, 1.0)
    _, sizes, directions = torch.linalg.svd(x, full_matrices=False)
    share = (sizes**2).cumsum(0) / (sizes**2).sum().clamp(min=torch.finfo(torch.float64).tiny)
    kept = int((share <= 1 - nu).sum()) + 1 if nu > 0 else len(directions)
    return directions[kept:].float()
