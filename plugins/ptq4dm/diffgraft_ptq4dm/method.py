"""PTQ4DM's own arithmetic: which timesteps are calibrated on, and the range of a grid. Free of diffusers."""

from __future__ import annotations

import math

import torch
from diffgraft.methods.quant.affine import Scale, UniformAffine
from torch import Tensor

CANDIDATES = 100
"""Ranges that a search tries: 1/100, 2/100 ... of the largest value."""


def drawn(count: int, total: int, mu: float, sd: float, generator: torch.Generator) -> Tensor:
    """t_i = clamp(int(N(mu, sd) T), 0, T - 1) [count], whole numbers: 0 is the least noise (normally distributed time-step calibration).

    With mu = sd = 0.4 a share of 16 % falls below 0 and 7 % above T, and lies on the ends.
    """
    normal = torch.empty(count).normal_(mu, sd, generator=generator)
    return (normal * total).trunc().long().clamp(0, total - 1)


def uniform(count: int, total: int, generator: torch.Generator) -> Tensor:
    """The same, equally often at all timesteps."""
    return torch.randint(total, (count,), generator=generator)


def distribution(total: int, mu: float, sd: float) -> Tensor:
    """P(t_i <= t) for t = 0 ... T - 1 under :func:`drawn` [T]."""
    below = (torch.arange(1, total + 1, dtype=torch.float64) / total - mu) / sd
    cdf = 0.5 * (1 + torch.erf(below / math.sqrt(2)))
    cdf[-1] = 1.0
    return cdf


def step_of(t: Tensor, total: int) -> Tensor:
    """The step of a run in which the denoiser is asked at timestep number t: the first one is at T - 1."""
    return total - 1 - t


def searched(x: Tensor, grid: UniformAffine, p: float = 2.4) -> Scale:
    """The scale of the range whose mean ``|x - x_q|^p`` is least, for each channel (or the tensor) its own.

    Ranges are [-c, c], c a share of the largest ``|x|``; [0, c] or [-c, 0] of a tensor that lies on one side.
    """
    low, high = grid.ends(x)
    axes = tuple(axis for axis in range(x.ndim) if low.shape[axis] == 1)
    x, most = x.float(), torch.maximum(low.abs(), high)
    down, up = (0.0 if bool((low >= 0).all()) else 1.0), (0.0 if bool((high <= 0).all()) else 1.0)
    best, least = grid.scale(-down * most, up * most), torch.full_like(low, torch.inf)
    for i in range(1, CANDIDATES + 1):
        scale = grid.scale(-down * most * i / CANDIDATES, up * most * i / CANDIDATES)
        error = (x - grid.rounded(x, scale)).abs().pow(p).mean(axes, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = Scale(*(torch.where(better, new, old) for new, old in zip(scale, best, strict=True)))
    return best
