"""Learned rounding (AdaRound, arXiv 2004.10568) and reconstruction of blocks (BRECQ, arXiv 2102.05426).

Each weight is rounded down or up, w_q = delta (clamp(floor(w / delta) + h(alpha) + z) - z); h goes from 0 to 1, and alpha is learned:

    minimise  sum_c (y_q - y)^2, mean over the rest,  +  lambda sum (1 - |2 h - 1|^beta)

beta falls, so that at the end each h is 0 or 1. Whatever was learned is kept only where it beats rounding to the nearest on all that it was
learned from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffgraft.methods.quant.affine import steps
from diffgraft.methods.quant.layers import QuantLayer, Rounder, Weights

GAMMA, ZETA = -0.1, 1.1
"""The stretch of the sigmoid: h reaches 0 and 1 at a finite alpha."""

Outputs = Callable[[list[int]], Tensor]
"""Outputs [samples, channels, ...] of the samples of these numbers."""


@dataclass(frozen=True)
class Recipe:
    """How long and how. ``betas`` and ``warmup`` (share of the steps without a penalty) as in AdaRound; ``weight`` is lambda."""

    steps: int = 20_000
    batch: int = 32
    lr: float = 1e-3
    weight: float = 0.01
    warmup: float = 0.2
    betas: tuple[float, float] = (20.0, 2.0)
    p: float = 2.0

    def beta(self, step: int) -> float | None:
        """beta of a step, falling linearly after the warm-up; None in it."""
        start, (first, last) = self.warmup * self.steps, self.betas
        return None if step < start else last + (first - last) * max(0.0, 1 - (step - start) / max(self.steps - start, 1))


class Losses(NamedTuple):
    """Mean distance from the targets over all samples: before, after, and whether what was learned was kept."""

    before: float
    after: float
    kept: bool


def h(alpha: Tensor) -> Tensor:
    """The rectified sigmoid, 0 to 1."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def first_alpha(ratio: Tensor) -> Tensor:
    """The alpha at which h is what w / delta has behind the point: nothing is rounded yet."""
    rest = ratio - ratio.floor()
    return -torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1)


def penalty(alpha: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)``: 0 where every h is 0 or 1."""
    return (1 - (2 * h(alpha) - 1).abs().pow(beta)).sum()


def distance(y: Tensor, target: Tensor, p: float = 2.0) -> Tensor:
    """sum over the channels (axis 1) of ``|y - target|^p``, mean over the rest."""
    return (y.float() - target.float()).abs().pow(p).sum(1).mean()


class Rounding:
    """The alpha of one weight, all its parts, while they are learned."""

    def __init__(self, weights: Weights, weight: Tensor) -> None:
        """
        Args:
            weight: what is rounded: the layer's, times its balance.
        """
        self.weights, self.weight = weights, weight.detach().float()
        parts = weights.parts(self.weight)
        self.alpha = torch.cat([first_alpha(steps(part, scale)) for part, scale in parts], 1).requires_grad_()

    def value(self) -> Tensor:
        """The weight with h in the place of a rounding; clamp lets a gradient through where it cuts nothing off."""
        grid, up = self.weights.grid, h(self.alpha).split(self.weights.sizes, 1)
        parts = zip(self.weights.parts(self.weight), up, strict=True)
        q = [(steps(part, s).floor() + u + s.zero).clamp(grid.lowest, grid.highest) for (part, s), u in parts]
        back = [(each - s.zero) * s.delta for each, s in zip(q, self.weights.scales, strict=True)]
        return torch.cat(back, 1).to(self.weights.value.dtype)

    def settle(self, up: Tensor | None) -> None:
        """Fix the weight, ``up`` or (None) at the nearest."""
        self.weights.learn, self.weights.up = None, up
        self.weights.value = self.weights.rounded(self.weight, up).to(self.weights.value.dtype)


def learn_rounding(outputs: Outputs, targets: Outputs, count: int, layers: Sequence[QuantLayer], recipe: Recipe, seed: int = 0) -> Losses:
    """Learn how the weights of ``layers`` (of a block, or one layer) are rounded, all parts of a split weight alike.

    Args:
        outputs: of the block with these layers in it.
        targets: of the block in floats.
        count: how many samples there are.
    """
    roundings = [Rounding(w, balanced(layer, i)) for layer in layers for i, w in enumerate(layer.weights)]  # type: ignore[arg-type]
    before = mean_distance(outputs, targets, count, recipe)
    for one in roundings:
        one.weights.learn = one.value
    try:
        with torch.enable_grad():
            descend([one.alpha for one in roundings], outputs, targets, count, recipe, seed, penalties=True)
    finally:
        ups = [one.alpha.detach() >= 0 for one in roundings]
        for one, up in zip(roundings, ups, strict=True):
            one.settle(up)
    after = mean_distance(outputs, targets, count, recipe)
    if not after <= before:  # NaN too
        for one in roundings:
            one.settle(None)
    return Losses(before, after, after <= before)


def balanced(layer: QuantLayer, i: int) -> Tensor:
    """What weight number ``i`` of a layer rounds: W s, rotated where its inputs are."""
    weight = layer.weight.detach().float()
    weight = weight if layer.balance is None else weight * layer.balance[i].reshape(1, -1, *[1] * (weight.ndim - 2))
    return weight if layer.rotation is None else layer.rotation(weight)  # type: ignore[no-any-return]


def learn_scales(outputs: Outputs, targets: Outputs, count: int, rounders: Sequence[Rounder], recipe: Recipe, seed: int = 0) -> Losses:
    """Learn delta of fixed scales of inputs, with a cosine to 0 for the learning rate; z stays."""
    fixed = [(rounder, rounder.delta.detach().clone()) for rounder in rounders if rounder.delta is not None]
    before = mean_distance(outputs, targets, count, recipe)
    for rounder, delta in fixed:
        rounder.delta = delta.clone().requires_grad_()
    try:
        with torch.enable_grad():
            descend([rounder.delta for rounder, _ in fixed if rounder.delta is not None], outputs, targets, count, recipe, seed)
    finally:
        for rounder, delta in fixed:
            rounder.delta = rounder.delta.detach().clamp(min=delta.min() / 100)  # type: ignore[union-attr]
    after = mean_distance(outputs, targets, count, recipe)
    if not after <= before:
        for rounder, delta in fixed:
            rounder.delta = delta
    return Losses(before, after, after <= before)


def descend(
    learned: Sequence[Tensor], outputs: Outputs, targets: Outputs, count: int, recipe: Recipe, seed: int, penalties: bool = False
) -> None:
    """Adam on random batches of the samples."""
    if not learned:
        return
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(list(learned), lr=recipe.lr)
    for step in range(recipe.steps):
        if not penalties:
            adam.param_groups[0]["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        chosen = torch.randint(count, (min(recipe.batch, count),), generator=generator).tolist()
        loss = distance(outputs(chosen), targets(chosen), recipe.p)
        beta = recipe.beta(step)
        if penalties and beta is not None:
            loss = loss + recipe.weight * torch.stack([penalty(alpha, beta) for alpha in learned]).sum()
        for one, gradient in zip(learned, torch.autograd.grad(loss, list(learned), allow_unused=True), strict=True):
            one.grad = gradient  # of what is learned alone: the model's own parameters get none
        adam.step()


@torch.no_grad()
def mean_distance(outputs: Outputs, targets: Outputs, count: int, recipe: Recipe) -> float:
    """Of all samples, a batch at a time."""
    total = 0.0
    for start in range(0, count, recipe.batch):
        numbers = list(range(start, min(start + recipe.batch, count)))
        total += float(distance(outputs(numbers), targets(numbers), recipe.p)) * len(numbers)
    return total / count
