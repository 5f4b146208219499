"""The losses of A-STAR (arXiv 2306.14544) on attention maps, as pure functions.

A [batch, M, h, w] float32 are the maps A_t^m of M concepts, 0 to 1, one stack a sample; ``there`` [batch, M] says which of them exist (the
samples of a batch may have different numbers of concepts). All sums over pixels are over i, j of the paper.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

TINY = 1e-12
"""Below every sum of a softmax's maps: keeps maps that do not exist from dividing 0 by 0."""


def share_in_common(a: Tensor, b: Tensor) -> Tensor:
    """sum_ij min(a, b) / sum_ij (a + b) over the last two axes: 0 for disjoint maps, 1/2 for equal ones."""
    return torch.minimum(a, b).sum((-2, -1)) / (a + b).sum((-2, -1)).clamp_min(TINY)


def segregation(A: Tensor, there: Tensor) -> Tensor:
    """L_seg [batch] = sum over pairs m > n of sum_ij min(A^m, A^n) / sum_ij (A^m + A^n) (eq. 2)."""
    losses = A.new_zeros(A.shape[0])
    for m, n in combinations(range(A.shape[1]), 2):
        losses = losses + (there[:, m] & there[:, n]) * share_in_common(A[:, m], A[:, n])
    return losses


def retention(A: Tensor, B: Tensor, there: Tensor) -> Tensor:
    """L_ret [batch] = sum_m [1 - sum_ij min(A^m, B^m) / sum_ij (A^m + B^m)] (eq. 3), B^m the masks of the step before.

    At least 1/2 for each concept: the denominator counts what both have in common twice.
    """
    return ((1 - share_in_common(A, B)) * there).sum(1)


def binarised(A: Tensor, threshold: Literal["mean", "half_max"]) -> Tensor:
    """B_t^m: 1 where A_t^m is above its own mean, or above half of its own maximum, else 0."""
    level = A.mean((-2, -1), keepdim=True) if threshold == "mean" else A.amax((-2, -1), keepdim=True) / 2
    return (level < A).to(A.dtype)


def step_size(alpha: float, end: float, i: int, N: int) -> float:
    """alpha_t at step i of N: alpha * sqrt of a line from 1 at the first step to ``end`` at the last (Attend-and-Excite: end = 0.5)."""
    return alpha * math.sqrt(1 + (end - 1) * (i / (N - 1) if N > 1 else 0.0))


def concept_maps(probabilities: Tensor, weights: Tensor) -> Tensor:
    """A [batch, M, pixels] of probabilities [batch, pixels, tokens]; weights [batch, M, tokens] average a concept's tokens."""
    return weights @ probabilities.transpose(1, 2)


def sharpened(probabilities: Tensor, factor: float, first: int) -> Tensor:
    """Attend-and-Excite: a softmax of ``factor`` * probabilities over the tokens from ``first`` on, without the last one."""
    inner = (factor * probabilities[..., first:-1]).softmax(-1)
    return torch.nn.functional.pad(inner, (first, 1))


def smoothed(A: Tensor, sigma: float) -> Tensor:
    """Each map after a 3 x 3 Gaussian of width ``sigma`` pixels, reflected at its edges (Attend-and-Excite: 0.5)."""
    side = math.exp(-0.5 / sigma**2)
    line = A.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    padded = torch.nn.functional.pad(A.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return torch.nn.functional.conv2d(padded, torch.outer(line, line)[None, None]).view_as(A)
