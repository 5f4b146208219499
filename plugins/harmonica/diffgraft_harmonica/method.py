"""HarmoniCa's formulas (arXiv 2410.01723), without a model.

A router is a table of logits rho [T, L], a row for each step in the order in which a run makes them, a column for each layer; its scores
are r = sigmoid(rho). tau is the threshold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ALWAYS = 5.0
"""The logit of the first step, which is not learned, and the largest that any may have; the smallest is -ALWAYS."""


def computed(logits: Tensor, tau: float) -> list[tuple[bool, ...]]:
    """For each layer at which of the T steps it computes: where r > tau, and always at the first; elsewhere it reuses what it has."""
    table = logits.sigmoid() > tau
    table[0] = True
    return [tuple(column) for column in table.T.tolist()]  # check: allow host_sync because the router is on the CPU, read once a run


def mixed(cached: Tensor, fresh: Tensor, score: Tensor) -> Tensor:
    """(1 - r) c + r o: what a layer gives while the router learns; ``score`` is a 0-dim tensor. At r = 1 it is ``fresh``, bit for bit."""
    return cached * (1 - score) + fresh * score


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """What the scheduler gets under guidance."""
    return uncond + scale * (cond - uncond)


def squared_error(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of each row, [batch], float32."""
    return (one.float() - other.float()).square().flatten(1).mean(1)


def image_error_proxy(scores: Tensor, final: Callable[[Tensor], Tensor]) -> Tensor:
    """lambda [T] of the image error proxy-guided objective: what the routing of each step does to the picture.

    First every layer computes at every step; then step after step, in running order, takes its scores and keeps them. lambda_s is the mean
    squared difference of the final latents that this makes; the first step is not routed, its lambda is 0.

    Args:
        scores: r [T, L].
        final: the final latents of a trajectory from always the same noise whose layers are mixed by such a table.
    """
    table, found = torch.ones_like(scores), scores.new_zeros(len(scores))
    before = final(table)
    for s in range(1, len(scores)):
        table = table.clone()
        table[s] = scores[s]
        now = final(table)
        found[s] = squared_error(now, before).mean()
        before = now
    return found
