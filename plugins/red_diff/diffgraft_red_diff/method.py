"""RED-diff's maths: the two gradients of its objective, and the weights of the prior over noise levels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["linear", "sqrt", "square", "log", "clip", "power", "const"]
LARGEST = 200.0
"""Of r: the noisiest level of the paper's models has 158, and one of pure noise has none."""


def share(r: Tensor, weighting: Weighting) -> Tensor:
    """g(r) / r, with r = s / a the noise-to-signal ratio of a level.

    The prior's gradient is w (eps_hat - eps), w = lambda g(r). As x = a mu + s eps = a x0_hat + s eps_hat, it is
    lambda g(r) / r (mu - x0_hat), which is finite at pure noise too.
    """
    r = r.clamp(max=LARGEST)
    return {
        "linear": lambda: torch.ones_like(r),
        "sqrt": lambda: r.rsqrt(),
        "square": lambda: r,
        "log": lambda: r.log1p() / r,
        "clip": lambda: r.clamp(max=1) / r,
        "power": lambda: r.pow(-1 / 3),
        "const": lambda: 1 / r,
    }[weighting]()


def prior_gradient(mu: Tensor, x0: Tensor, r: Tensor, lam: float, weighting: Weighting) -> Tensor:
    """d/dmu of  lambda g(r) mean(stopgrad(eps_hat - eps) mu)  for each sample [n, ...]; nothing flows through the denoiser.

    Args:
        x0: what the denoiser says of the clean sample.
    """
    return lam * share(r, weighting) * (mu - x0) / mu[0].numel()


def misfit(measured: Tensor, y: Tensor) -> Tensor:
    """mean((y - A(x))^2) / 2, the sum over the samples: each has its own mean, so a batch is what its samples are alone."""
    return (measured - y).square().flatten(1).mean(1).sum() / 2
