"""The maths: polynomial extrapolation of a denoiser's output along its path, and how wrong it will be, told by how wrong it was."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def lagrange(nodes: Sequence[float], at: float) -> list[float]:
    """Weights w_i with p(at) = sum_i w_i v_i for the polynomial p through (theta_i, v_i); they add up to 1.

    Args:
        nodes: theta_i, all different.
    """
    return [math.prod((at - other) / (node - other) for other in nodes if other != node) for node in nodes]


def extrapolated(nodes: Sequence[float], values: Sequence[Tensor], at: float) -> Tensor:
    """p(at), summed in float32: the weights alternate in sign, and what bfloat16 rounds they would magnify."""
    out: Tensor = sum(w * v.float() for w, v in zip(lagrange(nodes, at), values, strict=True))  # type: ignore[assignment]
    return out.to(values[-1].dtype)


def distance(nodes: Sequence[float], at: float) -> float:
    """prod_i |at - theta_i|: v(at) - p(at) is this times a derivative of v, v^(n+1) / (n+1)! (the remainder of interpolation)."""
    return math.prod(abs(at - node) for node in nodes)


def relative_error(forecast: Tensor, value: Tensor) -> Tensor:
    """|| p - v || / || v || of each sample [rows, ...], the largest; 0-dim, on the device; NaN where v is 0."""
    value = value.float()
    away = (forecast.float() - value).flatten(1)
    return (torch.linalg.vector_norm(away, dim=1) / torch.linalg.vector_norm(value.flatten(1), dim=1)).max()
