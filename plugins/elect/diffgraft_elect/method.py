"""Relevance maps and the background inconsistency score of ELECT (arXiv 2504.13490); free of diffusers.

For each step t and seed i, with eps_T the prediction given picture and instruction and eps_I the one given the picture alone:

    d = sum over channels of |eps_T - eps_I|,  clipped at Q3 + 1.5 (Q3 - Q1),  scaled to [0, 1]
    m_t = the mean of d over the seeds (in the official code: squared), scaled to [0, 1]
    M = the mean of m_t over the first steps

M is near 1 where the instruction acts. A seed is worse the more its predicted clean sample differs from the source elsewhere:

    BIS_i = sum (w |x0_i - x_src|) / sum w,     |.| the mean over channels
    w = 1 - M^2 in latent space (the paper),    w = 1 - M, resized, in pixels (the official code)

All of it stays as it is when the predictions are multiplied by a number, so epsilon, v and x0 models have the same M.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Space = Literal["latent", "pixel"]


def scaled(maps: Tensor) -> Tensor:
    """Each of ``maps`` [rows, height, width] from its least value to its largest, as 0 to 1; 0 everywhere in one of a single value, or with
    NaN in it."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny), 0.0)


def difference(text: Tensor, image: Tensor) -> Tensor:
    """d of one step [rows, height, width], from eps_T and eps_I [rows, channels, height, width]; float32."""
    d = (text.float() - image.float()).abs().sum(1)
    first, third = torch.quantile(d.flatten(1), d.new_tensor([0.25, 0.75]), dim=1, interpolation="midpoint")
    most = third + 1.5 * (third - first)
    return scaled(d.minimum(most[:, None, None]))


def step_map(mean: Tensor, space: Space) -> Tensor:
    """m_t of the mean of d over the seeds, [rows, height, width]."""
    return scaled(mean.square() if space == "pixel" else mean)


def weight(M: Tensor, space: Space, size: tuple[int, int]) -> Tensor:
    """w of the background [rows, *size], from M [rows, height, width]."""
    if space == "latent":
        return 1 - M.square()
    return functional.interpolate((1 - M)[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def inconsistency(x0: Tensor, source: Tensor, M: Tensor, space: Space) -> Tensor:
    """BIS [rows], of predicted clean samples and the source's [rows, channels, height, width], both latents or both pixels.

    Args:
        M: [rows, height, width] of the latents.
    """
    error = (x0.float() - source.float()).abs().mean(1)
    w = weight(M, space, (error.shape[1], error.shape[2]))
    return (w * error).sum((1, 2)) / w.sum((1, 2))
