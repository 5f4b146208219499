"""MGLD's maths: latents are warped along the optical flow and held against their neighbours, where the flow says that both see the same.

z_i latents of frame i, f_i the flow from frame i to i + 1 and b_i that from i + 1 to i, in latent pixels; of_i, ob_i what is hidden in the
other frame; W(z, f) the picture z looked up at x + f(x):

    L_b = sum_i mean |(1 - of_i) (W(z_{i+1}, f_i) - z_i)|          L_f = sum_i mean |(1 - ob_i) (W(z_i, b_i) - z_{i+1})|
    L = L_b + L_f                z <- z - g scale(t) dL/dz

The loss is of the latents alone, so its gradient is written out here: no graph, and none through the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Pairs = Literal["neighbours", "official"]
Scale = Literal["neg_log_var", "sigma", "const"]
LEAST = 1e-20
"""Of the posterior's variance, before its logarithm (official code): the last step's is 0."""


class Warp(NamedTuple):
    """Where the pixels of n warped pictures come from: ``index`` [n, 4, h w] of the four pixels around each place, and their ``weight``.

    By hand and not by ``grid_sample``, which goes through -1 to 1 and back: there a flow of whole pixels leaves 1e-7 of the neighbour, of
    which L1's gradient, a sign, would make a whole step.
    """

    index: Tensor
    weight: Tensor


def warping(flow: Tensor) -> Warp:
    """Of flows [n, 2, h, w] (x, then y, in pixels); outside of the picture is 0."""
    h, w = flow.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h, device=flow.device), torch.arange(w, device=flow.device), indexing="ij")
    x, y = x + flow[:, 0], y + flow[:, 1]
    index, weight = [], []
    for down in (0, 1):
        for right in (0, 1):
            column, row = x.floor() + right, y.floor() + down
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            share = (1 - (x - column).abs()) * (1 - (y - row).abs())
            weight.append(torch.where(inside, share, torch.zeros_like(share)))
            index.append(row.clamp(0, h - 1).long() * w + column.clamp(0, w - 1).long())
    return Warp(torch.stack(index, 1).flatten(2), torch.stack(weight, 1).flatten(2))


def warped(x: Tensor, by: Warp) -> Tensor:
    """W(x, f) of pictures [b, n, c, h, w]: bilinear, zeros outside."""
    flat = x.flatten(3)
    out = torch.zeros_like(flat)
    for corner in range(4):
        out = out + by.weight[:, corner, None] * flat.gather(-1, by.index[:, corner, None].expand(flat.shape))
    return out.unflatten(-1, x.shape[-2:])


def warped_back(y: Tensor, by: Warp) -> Tensor:
    """W^T y: each value goes back to the four pixels that it was made of."""
    flat = y.flatten(3)
    out = torch.zeros_like(flat)
    for corner in range(4):
        out.scatter_add_(-1, by.index[:, corner, None].expand(flat.shape), by.weight[:, corner, None] * flat)
    return out.unflatten(-1, y.shape[-2:])


def occluded(forward: Tensor, backward: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """(of, ob) [n, h, w], 1 where there and back does not lead home: |f + W(b, f)| > alpha (|f| + |b|) + beta, and the other way round.

    Args:
        forward, backward: [n, 2, h, w] between frames i and i + 1, in the pixels that are warped.
    """

    def length(flow: Tensor) -> Tensor:
        return flow.square().sum(1).sqrt()

    threshold = alpha * (length(forward) + length(backward)) + beta
    home = forward + warped(backward[None], warping(forward))[0], backward + warped(forward[None], warping(backward))[0]
    return (length(home[0]) > threshold).to(forward.dtype), (length(home[1]) > threshold).to(forward.dtype)


@dataclass(frozen=True)
class Motion:
    """What is held against what, for p pairs of frames: frame ``source`` [p], warped ``by``, against frame ``target`` [p] where that is
    ``visible`` [p, 1, h, w]."""

    source: Tensor
    target: Tensor
    by: Warp
    visible: Tensor


def motion_of(forward: Tensor, backward: Tensor, hidden: tuple[Tensor, Tensor], pairs: Pairs = "neighbours") -> Motion:
    """The pairs of a clip of T frames.

    Args:
        forward, backward: f and b, [T - 1, 2, h, w] in latent pixels.
        hidden: of and ob, [T - 1, h, w].
        pairs: "official": as the authors' code has it, whose loop warps z_i along the flow that *leaves* the pair (f_{i+1} for f_i, b_{i-1}
            for b_i), and whose first comparison each way is with 0.
    """
    n = len(forward)
    earlier = torch.arange(n, device=forward.device)
    source, target = torch.cat([earlier + 1, earlier]), torch.cat([earlier, earlier + 1])
    visible = 1 - torch.cat(hidden)[:, None]
    if pairs == "neighbours":
        return Motion(source, target, warping(torch.cat([forward, backward])), visible)
    by = warping(torch.cat([forward.roll(-1, 0), backward.roll(1, 0)]))
    alone = (torch.arange(2 * n, device=forward.device) == n - 1) | (torch.arange(2 * n, device=forward.device) == n)
    return Motion(source, target, Warp(by.index, by.weight * ~alone[:, None, None]), visible)


def loss_and_gradient(z: Tensor, motion: Motion) -> tuple[Tensor, Tensor]:
    """(L [b], dL/dz) of clips z [b, T, c, h, w]. The mean is over all elements of a frame, hidden ones too; each clip has its own L."""
    elements = z[0, 0].numel()
    difference = motion.visible * (warped(z[:, motion.source], motion.by) - z[:, motion.target])
    pull = motion.visible * difference.sign() / elements
    gradient = torch.zeros_like(z).index_add_(1, motion.target, -pull)
    gradient.index_add_(1, motion.source, warped_back(pull, motion.by))
    return difference.abs().sum((1, 2, 3, 4)) / elements, gradient


def posterior_variance(abar: Tensor, after: Tensor) -> Tensor:
    """(1 - abar') / (1 - abar) (1 - abar / abar'): of q(z_{t-1} | z_t, z_0), from a step's signal power before and after it."""
    return (1 - after) / (1 - abar).clamp(min=LEAST) * (1 - abar / after.clamp(min=LEAST))


def scale_of(kind: Scale, abar: Tensor, after: Tensor) -> Tensor:
    """scale(t): -log of the posterior's variance (official: it grows towards the clean end, to 46 at variance 0), its root, or 1."""
    if kind == "const":
        return torch.ones_like(after)
    variance = posterior_variance(abar, after)
    return -variance.clamp(min=LEAST).log() if kind == "neg_log_var" else variance.clamp(min=0).sqrt()
