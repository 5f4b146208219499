"""Key points of a teacher's trajectory, in the paper's symbols; free of diffusers.

A teacher's sampler goes through K + 1 points x_{s_0}, ..., x_{s_K} (s_0 noise, s_K clean). Of these N + 1 are kept,

    t_i = round(i K / N),   i = 0..N                                                               (key points)

and a student that makes N steps is to be at x_{t_{i+1}} after one step from x_{t_i}. A flow model's Euler step is

    x^_{t_{i+1}} = x_{t_i} + (sigma_{t_{i+1}} - sigma_{t_i}) v(x_{t_i}, sigma_{t_i})               (jump)
    L = || x^_{t_{i+1}} - x_{t_{i+1}} ||^2                                                         (trajectory loss)

Where N divides K the kept levels are those that N steps take by themselves, whatever function of the level shifts the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def key_points(K: int, N: int) -> list[int]:
    """t_0..t_N [N + 1], rising from 0 to K; a half is rounded down.

    Raises:
        ValueError: N is not from 1 to K.
    """
    if not 1 <= N <= K:
        raise ValueError(f"{N} steps of {K}")
    return [(2 * i * K + N - 1) // (2 * N) for i in range(N + 1)]


def union(K: int, counts: Sequence[int]) -> list[int]:
    """The key points of students of several N, rising."""
    return sorted({t for N in counts for t in key_points(K, N)})


def linear(K: int) -> Tensor:
    """1, 1 - 1/K, ..., 1/K [K], float64: a flow's levels before they are shifted, without the last one, 0."""
    return torch.arange(K, 0, -1, dtype=torch.float64) / K


def jump(x: Tensor, v: Tensor, here: Tensor, there: Tensor) -> Tensor:
    """x^_{t_{i+1}} [batch, ...] (jump), float32; ``here`` and ``there`` are sigma_{t_i} and sigma_{t_{i+1}} [batch]."""
    size = (there - here).reshape(-1, *[1] * (x.ndim - 1))
    return x.float() + size.to(device=x.device, dtype=torch.float32) * v.float()


def trajectory_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """L [batch], a mean over the entries of a sample."""
    return (found.float() - wanted.float()).square().flatten(1).mean(1)
