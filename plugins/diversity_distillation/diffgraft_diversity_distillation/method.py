"""The mathematics of diversity distillation, without diffusers.

Symbols: B the base model, D the distilled one, S_B and S_D their schedules, N_B and N_D their numbers of steps, k the first step that D
makes, w_B the base's guidance scale.
"""

from __future__ import annotations

import torch
from torch import Tensor


def guided(uncond: Tensor, cond: Tensor, w: float) -> Tensor:
    """eps_B = eps(0) + w_B (eps(c) - eps(0)); ``cond`` itself for w_B <= 1, where diffusers (and the official code) leave guidance out."""
    return cond if w <= 1 else uncond + w * (cond - uncond)


def handoff(base_timesteps: Tensor, target: Tensor | None) -> int:
    """j = argmin_i |S_B[i] - s*|, the number of steps that B makes; all of them where D has no step left (``target`` None).

    ``base_timesteps`` [N_B] and ``target`` s* = S_D[k] (0-dim) are two different grids, so their values are what there is to compare.
    """
    if target is None:
        return len(base_timesteps)
    return int((base_timesteps.double() - target.to(base_timesteps.device).double()).abs().argmin())


def rescaled(x: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """A sample kept at scale ``old`` brought to scale ``new``.

    The scale of x = a x_0 + s eps is r = sqrt(a^2 + s^2): 1 for variance-preserving samples, sqrt(1 + sigma^2) for exploding ones.
    """
    return (x * (new / old).to(x.device)).to(x.dtype)


def scale_of(a: Tensor, s: Tensor) -> Tensor:
    """r = sqrt(a^2 + s^2) of a signal level and a noise level."""
    return torch.sqrt(a * a + s * s)


def forwards(j: int, k: int, steps: int, w: float) -> int:
    """NFE = 2 j + (N_D - k): evaluations of one sample when D runs without guidance.

    For w_B <= 1 B needs no second half: j + (N_D - k). Where B answers D's own steps, j = k.
    """
    return (2 if w > 1 else 1) * j + max(steps - k, 0)
