"""The equations of ERTACache (arXiv 2508.21091), without a model.

Symbols: r residual of the block stack, r~ the cached one; v velocity (the denoiser's output), v~ the one made with r~; i step, counted in
running order from 0 (the paper counts down); k = age of a cached residual in steps; T steps; sigma noise level, which the paper calls t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Errors = Sequence[Sequence[float]]
"""[T][W]: the relative error of step i when the residual of step i - k is reused, at ``[i][k - 1]``; inf where it was not measured."""


def relative_error(cached: Tensor, true: Tensor) -> Tensor:
    """l1_rel = ||r~ - r||_1 / ||r||_1, a 0-dim float32 tensor; the two have one shape."""
    return (cached.float() - true.float()).abs().sum() / true.float().abs().sum()


def may_reuse(errors: Errors, i: int, k: int, threshold: float, longest: int, first: int, last: int) -> bool:
    """Whether step ``i`` may reuse a residual that is ``k`` steps old: l1_rel < lambda, and none of the steps that are always computed.

    Args:
        threshold: lambda.
        longest: largest k.
        first, last: so many steps at the beginning and at the end are always computed.
    """
    return first <= i < len(errors) - last and 1 <= k <= min(longest, len(errors[0])) and errors[i][k - 1] < threshold


def policy(errors: Errors, threshold: float, longest: int, first: int, last: int) -> list[int]:
    """The static schedule: for each step the age k of the residual that it reuses, 0 where it is computed. The set S is where k > 0."""
    ages: list[int] = []
    for i in range(len(errors)):
        age = ages[-1] + 1 if ages else 0
        ages.append(age if may_reuse(errors, i, age, threshold, longest, first, last) else 0)
    return ages


def threshold_for(errors: Errors, computed: int, longest: int, first: int, last: int) -> float:
    """The smallest lambda whose policy computes at most ``computed`` steps.

    Raises:
        ValueError: no lambda does.
    """
    for threshold in sorted({e for row in errors for e in row if e < float("inf")}):
        just_above = threshold * (1 + 1e-6) + 1e-12
        if policy(errors, just_above, longest, first, last).count(0) <= computed:
            return just_above
    raise ValueError(f"no threshold computes at most {computed} of {len(errors)} steps with at most {longest} reused in a row")


def correction_coefficient(error: Tensor, reference: Tensor) -> Tensor:
    """phi = clip(1 - error / reference, 0, 1); error = ||v~_i - v_i||_1, reference = ||v_i - v_{i-1}||_1 or ||v_i||_1. 0 / 0 gives 1."""
    ratio = torch.where(error == 0, torch.zeros_like(error), error / reference)
    return (1 - ratio).clamp(0, 1)


def adjusted_sigmas(sigmas: Tensor, phi: Tensor) -> Tensor:
    """The grid whose step i is phi_i of what is due there; what it leaves is shared out over the steps after it.

    The paper: dt_i = phi_i dt_c, and dt_c = (1 - sum_{j<i} dt_j) / (1 - i/T) in units of 1/T. On a grid of any spacing, step i's due part
    is (sigma_i - sigma_{i+1}) / sigma_i of the way that is left, so

        sigma'_{i+1} = sigma'_i (1 - phi_i (1 - sigma_{i+1} / sigma_i)),    sigma'_0 = sigma_0

    which is the paper's rule where the spacing is even. The last phi must be 1: then sigma'_T is exactly 0.

    Args:
        sigmas: [T + 1], decreasing, the last one 0.
        phi: [T].
    """
    s = sigmas.double()
    left = 1 - phi.to(s) * (1 - s[1:] / s[:-1])
    return torch.cat([s[:1], s[:1] * left.cumprod(0)]).to(sigmas.dtype)


def moments(x: Tensor, y: Tensor) -> Tensor:
    """[5, C]: n and the sums of x, y, x x, x y over all but the last axis, which is that of the channels; x and y are [..., C]."""
    x, y = x.flatten(0, -2).float(), y.flatten(0, -2).float()
    return torch.stack([torch.ones_like(x).sum(0), x.sum(0), y.sum(0), (x * x).sum(0), (x * y).sum(0)])


def linear_model(sums: Tensor) -> tuple[Tensor, Tensor]:
    """K and B of the error model eps = sigmoid(K v~ + B), with the sigmoid taken to first order: eps = (K v~ + B) / 4 + 1/2.

    K = 4 S_{v eps} / S_{vv} and B = 4 (mean(eps) - 1/2) - K mean(v~): least squares, per channel.

    Args:
        sums: [5, ..., C], :func:`moments` of v~ and eps = v~ - v, added up over the calibration set.
    """
    n, x, y, xx, xy = sums.double()
    n = n.clamp(min=1)
    mean_x, mean_y = x / n, y / n
    variance, covariance = xx / n - mean_x**2, xy / n - mean_x * mean_y
    known = variance > 1e-12
    K = torch.where(known, 4 * covariance / torch.where(known, variance, 1.0), 0.0)
    return K.float(), (4 * (mean_y - 0.5) - K * mean_x).float()


def rectification(K: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(gain, offset) of v^ = v~ - eps = gain v~ + offset."""
    return 1 - K / 4, -(B / 4 + 0.5)
