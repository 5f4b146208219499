"""rCM's formulas (arXiv 2510.08431), free of diffusers.

TrigFlow: x = cos(tau) x0 + sin(tau) n, tau in [0, pi/2]. Rectified flow (RF): x = (1 - t) x0 + t n, v = n - x0. The two are the same path:
divided by cos + sin, a TrigFlow sample is the RF sample at t = sin / (cos + sin) = tan / (1 + tan).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

SIGMA_MAX = 80.0
"""tan(tau_0): noise to signal where a run begins."""
SHIFT = 5.0
TABLES: dict[str, tuple[float, ...]] = {"quality": (1.5, 1.4, 1.0), "first": (1.3, 1.0, 0.6)}
"""tau of the steps behind the first, as published: the later table ("better visual quality"), and the earlier one."""


def rf_time(tau: float) -> float:
    """t = sin(tau) / (sin(tau) + cos(tau)); 0 at tau = 0."""
    return math.sin(tau) / (math.sin(tau) + math.cos(tau))


def published(table: str, sigma_max: float = SIGMA_MAX) -> tuple[float, ...]:
    """RF times of a table's four steps: .98765 .93378 .85290 .60898 ("quality"), .98765 .78271 .60898 .40622 ("first")."""
    return tuple(map(rf_time, (math.atan(sigma_max), *TABLES[table])))


def spread(steps: int, sigma_max: float = SIGMA_MAX) -> tuple[float, ...]:
    """RF times for any number of steps, not the paper's: t_0 s u / (1 + (s - 1) u), u falling evenly from 1, with the shift s = 5, at which
    four steps have nearly the times of "quality" (.98765 .92593 .82305 .61728)."""
    first, evenly = rf_time(math.atan(sigma_max)), [1 - i / steps for i in range(steps)]
    return tuple(first * SHIFT * u / (1 + (SHIFT - 1) * u) for u in evenly)


def times_of(times: str | Sequence[float], steps: int, sigma_max: float = SIGMA_MAX) -> tuple[float, ...]:
    """RF times of ``steps`` steps: the first of a table or of a list, or "spread".

    Raises:
        ValueError: there are fewer, or they do not fall from at most 1 to above 0.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps: at least 1")
    known = spread(steps, sigma_max) if times == "spread" else published(times, sigma_max) if isinstance(times, str) else tuple(times)
    if not known:
        raise ValueError("times = (): at least one, or 'quality', 'first', 'spread'")
    if any(not 0 < t <= 1 for t in known) or any(t <= s for t, s in pairwise(known)):
        shown = ", ".join(f"{t:.5g}" for t in known)
        raise ValueError(f"times = {shown} (sigma_max = {sigma_max:g}): each must be smaller than the one before, at most 1 and above 0")
    if steps > len(known):
        raise ValueError(
            f"{steps} steps, but times = {times!r} has {len(known)}: give num_inference_steps <= {len(known)}, times='spread', or times of "
            "your own"
        )
    return known[:steps]


def start(noise: Tensor, t: float) -> Tensor:
    """t n: a run's first latents, those of a sample of the path whose x0 is 0 (the mean of latents).

    The first official release, which kept its state in TrigFlow, began with n / (sin + cos) = .98773 n instead of .98765 n.
    """
    return t * noise


def clean(x: Tensor, v: Tensor, t: float | Tensor) -> Tensor:
    """x0 = x - t v, what the model says of the end."""
    return x - t * v


def renoised(x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """(1 - t) x0 + t n: where the next step begins, with fresh noise n."""
    return (1 - t) * x0 + t * noise


def refined(times: Sequence[float], most: float) -> list[list[float]]:
    """Each stretch of a falling list, from one time to the next, in even parts of at most ``most``; [[t, ..., s], [s, ..., r], ...]."""
    found = []
    for t, s in pairwise(times):
        parts = max(1, math.ceil((t - s) / most - 1e-9))
        found.append([t + (s - t) * part / parts for part in range(parts)] + [s])
    return found


def guided(cond: Tensor, uncond: Tensor | None, scale: float | None) -> Tensor:
    """The teacher's velocity under guidance."""
    return cond if uncond is None or scale is None else uncond + scale * (cond - uncond)


def pseudo_huber(difference: Tensor, c: float) -> Tensor:
    """sqrt(d^2 + c^2) - c of each element, its mean for each row, [batch]."""
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)


def consistency_loss(x0: Tensor, end: Tensor, c: float) -> Tensor:
    """Discrete-time consistency along a path, [batch]: each point's x0 against the next point's, which is held fixed; the last against
    the path's end.

    Args:
        x0: [points, batch, ...] what the student says at each point but the end.
        end: [batch, ...].
    """
    target = torch.cat([x0[1:].detach(), end[None]])
    return torch.stack([pseudo_huber(one - other, c) for one, other in zip(x0, target, strict=True)]).mean(0)
