"""Ranking seeds, choosing among them, and noise that a seed alone decides; nothing of diffusers.

The paper's seed is a number s, its noise x_T(s), its worth the mean over prompts P of what a scorer says of the pictures G(x_T(s), p):

    worth(s) = 1/|P| sum_p r(G(x_T(s), p), p),      golden seeds: the K of largest worth (of a distance such as FID: smallest)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Part = Literal["best", "worst", "none"]
TENTH = 10
"""One of so many seeds is golden where K is not said."""
LEAST_SIDE = 4
"""Pixels of a side in which a frame can be looked for."""


def default_k(number: int) -> int:
    """K for a ranking of so many seeds: a tenth, one at least."""
    return max(1, number // TENTH)


def chosen(ranking: Sequence[int], part: Part, k: int | None = None) -> tuple[int, ...]:
    """K seeds of a ranking (best first): the best, best first, or the worst, worst first.

    Raises:
        ValueError: it has fewer than ``k``.
    """
    k = default_k(len(ranking)) if k is None else k
    if k > len(ranking):
        raise ValueError(f"k = {k} of {len(ranking)} ranked seeds")
    if part == "none":
        return ()
    return tuple(ranking[:k]) if part == "best" else tuple(ranking[: -k - 1 : -1])


def spread(seeds: Sequence[int], pictures: int, generator: torch.Generator | None = None, by_lot: bool = False) -> list[int]:
    """A seed for each picture, none twice: in their order, or drawn by lot from ``generator`` (none: torch's own). A draw knows nothing of
    those before it.

    Raises:
        ValueError: there are more pictures than seeds.
    """
    if pictures > len(seeds):
        raise ValueError(f"{pictures} pictures, {len(seeds)} seeds")
    if not by_lot:
        return list(seeds[:pictures])
    device = "cpu" if generator is None else generator.device
    drawn = torch.randperm(len(seeds), generator=generator, device=device)[:pictures]
    return [seeds[i] for i in drawn.tolist()]  # once a call, before it begins


def generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """x_T(s) is what a pipeline draws from its generator: one for each picture, on the CPU, so that neither the device, nor the batch, nor
    the place in it says anything of the noise."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


# scorers for what the paper ties to seeds ---------------------------------------------------------------------------------------------


def colourfulness(pixels: Tensor) -> Tensor:
    """How far from grey pictures [n, 3, h, w] in 0..1 are [n]: the mean over pixels of largest minus smallest channel, 0 (grey) to 1."""
    return (pixels.amax(1) - pixels.amin(1)).mean(dim=(1, 2))


def border(pixels: Tensor, share: float = 1 / 16) -> Tensor:
    """How much of a frame pictures [n, 3, h, w] have [n]: the least over the four sides of the step in mean colour from the outer ``share``
    of a side to as much behind it. 0: none of it goes all round, or the frame is wider than both strips together.

    Raises:
        ValueError: a side is shorter than 4 pixels.
    """
    if min(pixels.shape[2:]) < LEAST_SIDE:
        raise ValueError(
            f"a picture of {pixels.shape[3]} x {pixels.shape[2]} pixels has no frame to look for: at least {LEAST_SIDE} a side"
        )
    n = max(1, round(share * min(pixels.shape[2:])))
    sides = (pixels, pixels.flip(2), pixels.transpose(2, 3), pixels.transpose(2, 3).flip(2))
    steps = [(x[:, :, :n].mean(dim=(2, 3)) - x[:, :, n : 2 * n].mean(dim=(2, 3))).abs().amax(1) for x in sides]
    return torch.stack(steps, 1).amin(1)
