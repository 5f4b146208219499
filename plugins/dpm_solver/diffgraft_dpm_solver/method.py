"""DPM-Solver in the papers' symbols (Lu et al., arXiv 2206.00927; the data-prediction form: arXiv 2211.01095); free of diffusers.

With lambda = log(alpha / sigma), one step from s to t, h = lambda_t - lambda_s, both forms are one formula. The noise form (k = 1) holds
eps_theta and scales the sample by alpha, the data form (k = -1, "++") holds x0_theta and scales it by sigma:

    noise   S = alpha, O = sigma, m = eps_theta, k = +1
    data    S = sigma, O = alpha, m = x0_theta,  k = -1
    x_t = (S_t / S_s) x_s - O_t [ (e^{k h} - 1) m_s + c (m_j - m_s) ]

where m_j is the prediction at an inner point s_j, which lies at lambda_s + r_j h, and c is 0 in first order (DDIM).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FORMS = {"noise": 1, "data": -1}
R: dict[int, tuple[float, ...]] = {1: (0.0,), 2: (0.0, 1 / 2), 3: (0.0, 1 / 3, 2 / 3)}
"""r_j of the points of a step at which the model is asked, by order."""


class Point(NamedTuple):
    """alpha, sigma and lambda of a sample: numbers, or tensors with one for each sample."""

    alpha: Any
    sigma: Any
    lam: Any


class Weights(NamedTuple):
    """Of x_s, m_s and m_j - m_s in the sample at another point."""

    x: Any
    m: Any
    change: Any


# orders -----------------------------------------------------------------------------------------------------------------------------


def fast(calls: int, order: int) -> list[int]:
    """Orders of the steps that take ``calls`` calls in all: DPM-Solver-fast; orders 1 and 2 as in the official code.

    Order 3: as many steps of 3 as leave something for the last ones, which are of order 1, 2, or (a multiple of 3) 2 and 1.
    """
    if order == 3 and calls and calls % 3 == 0:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [order] * (calls // order) + ([calls % order] if calls % order else [])


def fixed(calls: int, order: int) -> list[int]:
    """The same with one order only.

    Raises:
        ValueError: the calls are no multiple of it.
    """
    if calls % order:
        more, less = calls + order - calls % order, calls - calls % order
        raise ValueError(
            f"{calls} calls are no whole number of steps of order {order} (mode='fixed'): {f'{less} or ' if less else ''}{more} are, and "
            "mode='fast' takes any number"
        )
    return [order] * (calls // order)


# one step ---------------------------------------------------------------------------------------------------------------------------


def scales(at: Point, form: str) -> tuple[Any, Any]:
    """(S, O) of a form."""
    return (at.alpha, at.sigma) if form == "noise" else (at.sigma, at.alpha)


def expm1(z: Any) -> Any:
    return torch.expm1(z) if isinstance(z, Tensor) else math.expm1(z)


def weights(form: str, start: Point, to: Point, change: Any = 0.0) -> Weights:
    """Of the sample at ``to``; ``change`` is c.

    (e^{k h} - 1) is written as a difference of products where alpha_s may be 0, so that first order starts from pure noise.
    """
    (S_s, O_s), (S_t, O_t) = scales(start, form), scales(to, form)
    return Weights(S_t / S_s, O_t - S_t * O_s / S_s, -O_t * change)


def first(z: Any, r: float) -> Any:
    """c of the second-order step by the point at r: (e^z - 1) / (2 r), z = k h."""
    return expm1(z) / (2 * r)


def second(z: Any, r: float, reach: float = 1.0) -> Any:
    """c of phi_2 by the point at r, for a sample at ``reach`` of the step: (reach / r) ((e^{reach z} - 1) / (reach z) - 1).

    Third order takes it twice: for the point at 2/3 by that at 1/3, and for the end by that at 2/3.
    """
    return (reach / r) * (expm1(reach * z) / (reach * z) - 1)


def changes(form: str, h: Any, r: Sequence[float]) -> list[Any]:
    """c of the next point at each point of a step of order len(r); r[0] = 0."""
    z = FORMS[form] * h
    if len(r) == 1:
        return [0.0]
    if len(r) == 2:
        return [0.0, first(z, r[1])]
    return [0.0, second(z, r[1], r[2]), second(z, r[2])]


def combine(w: Weights, x: Tensor, m: Tensor, other: Tensor | None) -> Tensor:
    """The sample that the weights make; ``other`` is m_j, None where c = 0."""
    out = w.x * x + w.m * m
    return out if other is None else out + w.change * (other - m)


# step sizes -------------------------------------------------------------------------------------------------------------------------


def error(high: Tensor, low: Tensor, before: Tensor, atol: float, rtol: float) -> Tensor:
    """E [batch] of two solutions of different order: the RMS of their difference over delta = max(atol, rtol max(|low|, |before|)),
    ``before`` being the lower one of the last accepted step."""
    delta = (rtol * torch.maximum(low.abs(), before.abs())).clamp_min(max(atol, torch.finfo(low.dtype).tiny))  # 0 / 0 is no error
    return ((high - low) / delta).square().flatten(1).mean(1).sqrt()


def next_h(h: Tensor, E: Tensor, order: int, theta: float) -> Tensor:
    """theta h E^{-1/order}."""
    return theta * h * E.pow(-1 / order)
