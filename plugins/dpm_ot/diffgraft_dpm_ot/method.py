"""Semi-discrete optimal transport from white noise to J latents y_j of level m, in the paper's symbols; free of diffusers.

Brenier: the map that moves x ~ mu to the y_j, each of measure nu_j = 1 / J, with the least E|x - T(x)|^2 is the gradient of

    u_h(x) = max_j (<x, y_j> + h_j)             T(x) = y_j on the cell W_j(h) = {x : <x, y_j> + h_j >= <x, y_i> + h_i for all i}

which is the y_j that is nearest by power distance, |x - y_j|^2 - w_j with w_j = |y_j|^2 + 2 h_j. The heights h are those at which each cell
has its measure, the minimum of the convex energy

    E(h) = E_mu[u_h(x)] - sum_j nu_j h_j        dE/dh_j = mu(W_j(h)) - nu_j

With classes there is a map for each: the same x is sent among the y_j of its class alone, and E is the sum over the classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Source = Literal["normal", "uniform"]


def source_of(noise: Tensor, source: Source) -> Tensor:
    """x [n, d] of standard normal noise: itself, or Phi of each number, which is uniform on [0, 1]."""
    x = noise.flatten(1).float()
    return x if source == "normal" else torch.special.ndtr(x)


def values(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
    """<x, y_j> + h_j [n, J], for x [n, d], y [J, d] and h [J]."""
    return x @ y.T + h


def energy(u: Tensor, h: Tensor, cells: Tensor) -> Tensor:
    """E(h), a mean over samples, of ``u`` = :func:`values` [n, J]; ``cells`` [J]: each y_j's class, 0 ... C - 1. Summed over classes."""
    n, classes = len(u), int(cells.max()) + 1
    best = u.new_full((n, classes), -torch.inf).scatter_reduce(1, cells.expand(n, -1), u, "amax", include_self=False)
    return best.mean(0).sum() - (nu(cells) * h).sum()


def nu(cells: Tensor) -> Tensor:
    """nu_j = 1 / the number of y_j in its class [J]."""
    return 1.0 / torch.bincount(cells)[cells]


def cell_of(u: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The cell j of each sample [n]; ``allowed`` [n, J] says among which."""
    return (u if allowed is None else u.masked_fill(~allowed, -torch.inf)).argmax(1)


def histogram(u: Tensor, cells: Tensor) -> Tensor:
    """How many samples fall into each cell of their class [J]: all samples are sent once in each class."""
    counts = torch.zeros(len(cells), dtype=torch.long, device=u.device)
    for each in range(int(cells.max()) + 1):
        members = (cells == each).nonzero()[:, 0]
        counts[members] = torch.bincount(u[:, members].argmax(1), minlength=len(members))
    return counts


def off_by(counts: Tensor, cells: Tensor) -> float:
    """Total variation between the cells' measures and nu, of the worst class: 0 is exact, 1 is all in one cell of many."""
    shares = counts.double() / per_class(counts.double(), cells)[cells]
    return float(per_class((shares - nu(cells)).abs(), cells).max() / 2)


def per_class(values: Tensor, cells: Tensor) -> Tensor:
    """Sums over each class's j [C]."""
    return values.new_zeros(int(cells.max()) + 1).index_add(0, cells, values)


def chance(number: int, cells: Tensor) -> float:
    """What :func:`off_by` is of exact heights, by ``number`` samples: sum_j sqrt(nu_j (1 - nu_j) / (2 pi n)) of a class, the
    largest of the classes."""
    p = nu(cells).double()
    return float(per_class((p * (1 - p) / (2 * math.pi * number)).sqrt(), cells).max())


def unit_of(y: Tensor, cells: Tensor) -> Tensor:
    """The scale of h: the root mean square of |y_j - their class's mean|, which is the deviation of <x, y_j> among a class's j."""
    classes = int(cells.max()) + 1
    means = y.new_zeros(classes, y.shape[1]).index_add(0, cells, y * nu(cells)[:, None])
    return (y - means[cells]).square().sum(1).mean().sqrt().clamp(min=1e-6)
