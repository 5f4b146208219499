"""The maths of LATINO (arXiv 2503.12615) and LVTINO (arXiv 2510.01339) beside the operators' own proximal maps.

One step at the level k, of signal a_k and noise s_k, with the few-step model G, the autoencoder (E, D) and fresh noise eps:

    x      = D(G(z_k, tau_k))                                 what the model says of the clean picture
    x_hat  = prox(x; y, gamma_k)                              argmin_u ||A u - y||^2 / 2 + ||u - x||^2 / (2 gamma_k)
    z_k+1  = a_k+1 E(x_hat) + s_k+1 eps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

LEAST_NOISE = 2 / 255 / math.sqrt(12)
"""Deviation of the rounding to 8 bits, of pictures in [-1, 1]: a measurement is trusted no further."""

T = TypeVar("T")


def at_step(values: Sequence[T], k: int) -> T:
    """The value of step ``k``; the last one serves all later steps."""
    return values[min(k, len(values) - 1)]


def share_of_noise(a: Tensor, s: Tensor) -> Tensor:
    """s^2 / (a^2 + s^2): 1 - abar of the variance-preserving level with the same noise to signal."""
    return s * s / (a * a + s * s)


def gamma_of(delta: float, a: Tensor, s: Tensor, noise: float) -> Tensor:
    """gamma = delta (1 - abar) / sigma_y^2, LATINO's rule: how uncertain a prediction at this level is, to how noisy y is."""
    return delta * share_of_noise(a, s) / max(noise, LEAST_NOISE) ** 2


def nearest_level(abar: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """The timestep [] of a variance-preserving model whose noise to signal is the nearest, by its logarithm, to s / a.

    Args:
        abar: of its training's timesteps [T].
    """
    own = torch.log((1 - abar).clamp(min=1e-12) / abar.clamp(min=1e-12))
    return (own - 2 * torch.log(s.clamp(min=1e-6) / a.clamp(min=1e-6))).abs().argmin()


def framewise(x: Tensor) -> list[Tensor]:
    """The frames [n, c, h, w] of videos [n, c, f, h, w]; a picture is one."""
    return list(x.unbind(2)) if x.ndim == 5 else [x]


def joined(frames: Sequence[Tensor], like: Tensor) -> Tensor:
    """The way back."""
    return torch.stack(list(frames), 2) if like.ndim == 5 else frames[0]


def schedule_at(
    times: Sequence[float], timesteps: Tensor, sigmas: Tensor | None, scheduler: Any, flow: bool
) -> tuple[Tensor, Tensor | None]:
    """(timesteps, sigmas) of a run at these times, in the scheduler's own numbers; sigmas None where it has none.

    Args:
        timesteps, sigmas: of the scheduler's own schedule, whose dtypes, devices and end these get.
    """
    made = torch.tensor(times, dtype=torch.float64)
    told = (made if timesteps.is_floating_point() else made.round()).to(timesteps.device, timesteps.dtype)
    if sigmas is None:
        return told, None
    if flow:
        levels = made / scheduler.config.num_train_timesteps
    else:
        abar = scheduler.alphas_cumprod.double().cpu()[made.long()]
        levels = ((1 - abar) / abar).sqrt()
    levels = torch.cat([levels.to(sigmas.device, sigmas.dtype), sigmas[-1:]])
    return told, levels
