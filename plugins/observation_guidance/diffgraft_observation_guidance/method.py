"""Observation self-guidance's maths: energies of what a model says of the clean sample, and the two ways their gradient enters a step.

(Kollovieh et al., arXiv 2307.11494, section 3.2.) The score of a model is led by  -s grad_x E(x_t),  E = -log p(y | x0_hat(x_t)).
"""

from __future__ import annotations

from typing import Literal

import torch
from diffgraft.methods.predictions import SignalNoise
from torch import Tensor

Loss = Literal["squared", "pinball"]


def quantiles(n: int, K: int) -> Tensor:
    """q_k = k / (K + 1), k = 1 ... K, again and again for ``n`` samples, of which each K are of one measurement: [n]."""
    return (torch.arange(n) % K + 1) / (K + 1)


def squared(measured: Tensor, y: Tensor) -> Tensor:
    """(y - A(x0_hat))^2: a Gaussian's, of deviation 1 / sqrt(2 s)."""
    return (y - measured).square()


def pinball(measured: Tensor, y: Tensor, q: Tensor) -> Tensor:
    """max(q e, (q - 1) e), e = y - A(x0_hat): an asymmetric Laplace's, whose q-quantile is where it is least (eq. 10).

    Args:
        q: [n].
    """
    e = y - measured
    q = q.view(-1, *[1] * (e.ndim - 1))
    return torch.maximum(q * e, (q - 1) * e)


def energy(losses: Tensor, seen: Tensor, count: int) -> Tensor:
    """E [n]: the mean of the losses over what was seen, times the number of elements of x.

    So neither the size of a picture nor how much of it is seen changes what a pixel is told; a sum over what was seen (official code) is
    this times the share of it.

    Args:
        losses: [n, ...].
        seen: [1 or n, ...], 1 and 0.
        count: the elements of one x.
    """
    seen = seen.expand_as(losses)
    return count * (losses * seen).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1)


def eps_shift(gradient: Tensor, s: Tensor, scale: float) -> Tensor:
    """What DDIM adds to eps: scale s grad E, s = sqrt(1 - abar_t) (algorithm 2), as the score is -eps / s."""
    return scale * s * gradient


def is_told(levels: SignalNoise, noisiest: float) -> Tensor:
    """Whether a level has signal, and no more noise than ``noisiest`` times that.

    Above it x0_hat = (x - s eps_hat) / a is a small difference of large numbers, and so is its gradient.
    """
    return (levels.a > 0) & (levels.s <= noisiest * levels.a)


def output_shift(eps: Tensor, levels: SignalNoise, kind: str) -> Tensor:
    """What a denoiser's output changes by where the noise in it changes by ``eps``, x staying as it is."""
    a, s = levels
    factor = {
        "epsilon": torch.ones_like(a),
        "v_prediction": (a * a + s * s).sqrt() / a,  # v = (a eps - s x0) / r, x0 = (x - s eps) / a
        "sample": -s / a,
        "flow": (a + s) / a,  # eps - x0
    }[kind]
    return factor * eps


def posterior_variance(levels: SignalNoise, after: SignalNoise) -> Tensor:
    """Of q(x_t-1 | x_t, x0): (1 - abar') / (1 - abar) (1 - abar / abar'), abar' being the next level's."""
    return after.s.square() / levels.s.square() * (1 - (levels.a / after.a).square())


def after_step(gradient: Tensor, levels: SignalNoise, after: SignalNoise, scale: float) -> Tensor:
    """What DDPM adds to the sample after its step: -scale posterior_variance_t grad E (algorithm 1)."""
    return -scale * posterior_variance(levels, after) * gradient
