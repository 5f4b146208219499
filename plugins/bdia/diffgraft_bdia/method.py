"""Bi-directional integration approximation in the paper's symbols; free of diffusers.

A state z_i = a_i x0 + s_i eps lies at level i of a schedule. The one-step move (DDIM; Euler, where a = 1 - s) from level i to level j is
F(z_i, i -> j) = a_j x0 + s_j eps, with x0 and eps as the denoiser sees them at z_i.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Levels:
    """Signal level ``a`` and noise level ``s`` of a schedule's points [N + 1], or of one point (0-dim); float64 on the CPU."""

    a: Tensor
    s: Tensor

    def __getitem__(self, i: int) -> Levels:
        return Levels(self.a[i], self.s[i])


def clean_and_noise(z: Tensor, output: Tensor, at: Levels, asked: Levels, kind: str) -> tuple[Tensor, Tensor]:
    """(x0, eps) that the denoiser's ``output`` implies for the state ``z``.

    Args:
        z, output: [batch, ...].
        at: the level of ``z``.
        asked: the level that the denoiser was told; another one only where an inversion leaves the picture.
        kind: "epsilon", "v_prediction", "sample" or "flow" (output = eps - x0).
    """
    if asked is not at:  # the denoiser's noise, taken off a state that has less
        _, eps = clean_and_noise(z, output, asked, asked, kind)
        return (z - at.s * eps) / at.a, eps
    if kind == "epsilon":
        return (z - at.s * output) / at.a, output
    if kind == "v_prediction":
        return at.a * z - at.s * output, at.s * z + at.a * output
    if kind == "sample":
        return output, (z - at.a * output) / at.s
    return z - at.s * output, z + at.a * output


def move(x0: Tensor, eps: Tensor, to: Levels) -> Tensor:
    """F(z_i, i -> to)."""
    return to.a * x0 + to.s * eps


def bdia(before: Tensor, back: Tensor, forth: Tensor, gamma: float) -> Tensor:
    """The next state: gamma (before - F(z_i, i -> before's level)) + F(z_i, i -> next level) (eq. 17).

    Args:
        before: the state before z_i; back, forth: the moves from z_i to its level and to the next one.
        gamma: weight; on the inverse walk 1 / gamma, which is the same equation solved for the other end.
    """
    return gamma * (before - back) + forth


def amplification(gamma: float, steps: int, dtype: torch.dtype) -> float:
    """About how large rounding errors become on an inverse walk: each step divides them by gamma (measured: from 10 eps on)."""
    return 10 * torch.finfo(dtype).eps * gamma ** -(steps - 1)  # type: ignore[no-any-return]
