"""FLAIR's maths, in the paper's symbols; free of diffusers.

mu is the clean sample that is looked for, n the noise it is asked about with, x_t = (1 - t) mu + t n, and v the model's velocity there,
which is n - x0 of a perfect one. All samples are [batch, ...], t and the weights are 0-dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEAST = 1e-7
"""Added to the loss before it is inverted (official code)."""
STEADY = 1e-3
"""Relative change of the norm below which a power iteration has found it."""


def start_of(mu: Tensor, n: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """n_hat = x_t + (1 - t) v: the noise that the model's straight path through x_t began with."""
    return (1 - t) * mu + t * n + (1 - t) * v


def adjusted(n_hat: Tensor, z: Tensor, alpha: Tensor) -> Tensor:
    """Deterministic trajectory adjustment: n = alpha n_hat + sqrt(1 - alpha^2) z, for new noise z."""
    return alpha * n_hat + (1 - alpha * alpha).clamp(min=0).sqrt() * z


def prior_step(mu: Tensor, n: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """mu - step w (v - (n - mu)), with ``step`` the learning rate times w(t): at 1 it is n - v, the model's clean sample, to the bit."""
    return torch.lerp(mu, n - v, step)


def weights_of(loss: Tensor, subtract: bool = False) -> Tensor:
    """w(t), without its scale, of the losses [N] at t = 1 ... 0: 1 / loss, divided by its mean.

    Args:
        subtract: take the value at t = 0 off, and what falls below 0.
    """
    w = 1 / (loss.double() + LEAST)
    w = w / w.mean()
    return (w - w[-1]).clamp(min=0) if subtract else w


def at(values: Tensor, t: Tensor) -> Tensor:
    """That one of ``values`` [N], of t = 1 ... 0 at even distances, whose t is nearest."""
    grid = torch.linspace(1, 0, len(values), device=values.device, dtype=t.dtype)
    return values.take((grid - t.to(grid.device)).abs().argmin())


def data_steps(mu: Tensor, misfit: Callable[[Tensor], Tensor], rate: Tensor, steps: int, enough: float) -> tuple[Tensor, int]:
    """(mu after gradient steps on its misfit, how many were taken).

    A sample stops where its own misfit is below ``enough``, so a batch is what its samples are alone.

    Args:
        misfit: || A(D(mu)) - y ||^2 of each sample [n].
        rate: the learning rate times w(t) and lambda.
    """
    for k in range(steps):
        with torch.enable_grad():
            x = mu.detach().requires_grad_()
            each = misfit(x)
            goes_on = each.detach() >= enough
            if not bool(goes_on.any()):  # check: allow host_sync because a pass through the autoencoder and back costs far more
                return mu, k
            (gradient,) = torch.autograd.grad(each.sum(), x)
        goes_on = goes_on.view(-1, *[1] * (mu.ndim - 1))
        mu = torch.where(goes_on, mu - rate * gradient, mu)
    return mu, steps


def squared_norm(A: Callable[[Tensor], Tensor], AT: Callable[[Tensor], Tensor], like: Tensor, rounds: int = 100) -> float:
    """The largest eigenvalue of AT A, by power iteration from random pictures like ``like`` [1, ...]; 1 where A gives nothing."""
    x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    found = 0.0
    for _ in range(rounds):
        x = AT(A(x / x.norm()))
        new = float(x.norm())  # check: allow host_sync because it is asked once a run
        if not new > 0:
            return 1.0
        if abs(new - found) <= STEADY * new:
            return new
        found = new
    return found
