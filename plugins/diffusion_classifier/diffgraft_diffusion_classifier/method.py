"""The equations of a diffusion classifier, in tensors and numbers alone.

A picture z is noised, x = a z + s n, and the denoiser, told a prompt c, predicts from x what it was trained to predict. How far it is off
says how well c describes z:

    err_t(z, c) = mean of (prediction(x_t, t, c) - target_t)^2                 or its L2 norm
    err(z, c)   = mean over t of w_t err_t(z, c)

The prompt of a picture is the one of least err; the picture of a prompt the one of least err(z, c) - err(z, ""). The noises are the same
for all prompts and pictures: what differs between two errors is then the prompt, not the draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from diffgraft import ConfigError
from torch import Tensor

Norm = Literal["mse", "l2"]
Scheme = Literal["uniform", "epsilon", "sigma_sqrt", "cosmap"]


class Level(NamedTuple):
    """A time of the training schedule, in the scheduler's own numbers, and x = a z + s n there."""

    t: float
    a: float
    s: float


def vp_schedule(abar: Sequence[float]) -> list[Level]:
    """All levels of a variance-preserving model, most noise first; ``abar[t]`` is the cumulative product of its alphas."""
    return [Level(float(t), math.sqrt(abar[t]), math.sqrt(1 - abar[t])) for t in reversed(range(len(abar)))]


def flow_schedule(number: int, shift: float) -> list[Level]:
    """All levels of a flow model, most noise first: sigma = i / number for i from ``number`` to 1, shifted; t = number sigma."""
    plain = [i / number for i in range(number, 0, -1)]
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in plain]
    return [Level(number * s, 1 - s, s) for s in sigmas]


def spread(schedule: Sequence[Level], points: int, margin: int) -> list[Level]:
    """Every floor(T / points)-th level of a schedule of T without ``margin`` of them at either end, least noise first."""
    return list(schedule[margin : len(schedule) - margin : len(schedule) // points])[::-1]


def late(schedule: Sequence[Level], points: int) -> list[Level]:
    """``points`` levels evenly spaced among those with t in the noisier half of the times, least noise first."""
    noisy = [level for level in schedule if level.t >= len(schedule) / 2]
    return [noisy[int(i)] for i in torch.linspace(0, len(noisy) - 1, points, dtype=torch.float64)][::-1]


def noised(z: Tensor, noise: Tensor, level: Level) -> Tensor:
    """x = a z + s n."""
    return level.a * z + level.s * noise


def target(kind: str, z: Tensor, noise: Tensor, level: Level) -> Tensor:
    """What a denoiser that predicts ``kind`` was trained to say of :func:`noised` z."""
    if kind == "epsilon":
        return noise.expand_as(z)
    if kind == "v_prediction":
        return level.a * noise - level.s * z
    if kind == "flow":
        return noise - z
    return z  # "sample"


def error(prediction: Tensor, wanted: Tensor, norm: Norm) -> Tensor:
    """err_t of each row [rows]: the mean of the squared differences, or the root of their sum."""
    difference = (prediction.float() - wanted.float()).flatten(1)
    return difference.square().mean(1) if norm == "mse" else torch.linalg.vector_norm(difference, dim=1)


def weighting(scheme: Scheme, levels: Sequence[Level], kind: str) -> Tensor:
    """w_t of each level [T].

    epsilon     the error of the noise that the prediction implies, whatever the model predicts: (d eps / d prediction)^2
    sigma_sqrt  sigma^-2, sigma being the flow time s / (a + s)
    cosmap      2 / (pi (1 - 2 sigma + 2 sigma^2)) (both: Esser et al., arXiv 2403.03206, as diffusers has them)
    """
    a, s = (torch.tensor([level[i] for level in levels], dtype=torch.float64) for i in (1, 2))
    sigma = s / (a + s)
    if scheme == "epsilon":
        found = {"epsilon": torch.ones_like(a), "sample": (a / s) ** 2}.get(kind, a**2)
    elif scheme == "sigma_sqrt":
        found = sigma**-2
    elif scheme == "cosmap":
        found = 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    else:
        found = torch.ones_like(a)
    return found.float()


def weighted(errors: Tensor, weights: Tensor) -> Tensor:
    """err [...] of err_t [..., T]: the mean over t of w_t err_t."""
    return (errors * weights).mean(-1)


def accuracy(errors: Tensor, labels: Tensor, weights: Tensor) -> float:
    """The share of pictures [n] whose label has the least error of all prompts [n, prompts, T]; a tie is wrong."""
    found = weighted(errors, weights)
    least = found.min(1, keepdim=True).values
    right = (found.argmin(1) == labels) & ((found == least).sum(1) == 1)
    return float(right.float().mean())


def as_labels(errors: Tensor, labels: Tensor | Sequence[int]) -> Tensor:
    """Which prompt of each picture is right [pictures]."""
    told = torch.as_tensor(labels)
    fits = errors.ndim == 3 and told.shape == errors.shape[:1] and not told.is_floating_point()
    if not fits or not bool(((told >= 0) & (told < errors.shape[1])).all()):
        raise ConfigError(
            f"fit_weights: labels = {told.tolist()} for errors of shape {tuple(errors.shape)}: wanted are errors [pictures, prompts, "
            "times], and for each picture the number of its prompt, from 0"
        )
    return told.long()


def fit_weights(
    errors: Tensor,
    labels: Tensor | Sequence[int],
    *,
    degree: int | None = None,
    positive: bool = False,
    l1: float = 0.0,
    steps: int = 100,
    rate: float = 0.01,
    held: tuple[Tensor, Tensor | Sequence[int]] | None = None,
) -> tuple[float, ...]:
    """w_t that tell the labels of known pictures: Adam on the cross entropy of softmax(-err(z, c)) over the prompts.

    Args:
        errors: err_t [pictures, prompts, T]; ``labels`` [pictures] say which prompt is right.
        degree: of a polynomial in t, from -1 to 1 over the levels, begun at the constant 1; None: each w_t by itself, begun at 0.
        positive: exp of it, so that no weight is below 0.
        l1: share of sum |w_t| in the loss.
        held: (errors, labels) of other pictures; the weights of the step that is best on them are given (of equally good ones the first).
            Without them those of the last step.

    Raises:
        ConfigError: labels that do not go with the errors, no step, or no polynomial.
    """
    labels, held = as_labels(errors, labels), held and (held[0], as_labels(*held))
    if steps < 1 or (degree is not None and degree < 0):
        raise ConfigError(f"fit_weights: steps = {steps}, degree = {degree}: at least one step, and a degree of at least 0 (or None)")
    count = errors.shape[-1]
    times = torch.linspace(-1, 1, count)
    powers = torch.eye(count) if degree is None else torch.stack([times**i for i in range(degree + 1)])
    free = torch.zeros(len(powers))
    if degree is not None:
        free[0] = 1.0
    free.requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    best, share = torch.ones(count), 0.0

    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            weights = free @ powers
            weights = weights.exp() if positive else weights
            loss = torch.nn.functional.cross_entropy(-weighted(errors, weights), labels) + l1 * weights.abs().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if held is None:
                best = weights.detach()
            elif (here := accuracy(*held, weights.detach())) > share:
                best, share = weights.detach(), here
    return tuple(best.tolist())
