"""DiffusionMBIR's maths: one ADMM iteration of  min_x  || A x - y ||^2 / 2 + lambda || Dz x ||_1  on a volume x [depth, c, h, w].

    x <- CG steps on  (AT A + rho DzT Dz) x = AT y + rho DzT (d - u)
    d <- soft(Dz x + u, lambda / rho)
    u <- u + Dz x - d

d and u are kept from one iteration to the next; x comes from the denoiser each time (paper, section 3.3, algorithm 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Boundary = Literal["open", "circular"]
GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples are spread evenly over 0 to 1: a start for the power method without a draw."""


def dz(x: Tensor, boundary: Boundary) -> Tensor:
    """Dz x = x[z + 1] - x[z] along the first axis. Behind the last slice: 0 ("open"), or the first again ("circular")."""
    ahead = x.roll(-1, 0) - x
    if boundary == "open":
        ahead[-1] = 0
    return ahead


def dz_back(v: Tensor, boundary: Boundary) -> Tensor:
    """The adjoint DzT: <Dz x, v> = <x, DzT v>."""
    if boundary == "open":
        v = torch.cat([v[:-1], torch.zeros_like(v[-1:])])
    return v.roll(1, 0) - v


def soft(v: Tensor, k: Tensor | float) -> Tensor:
    """argmin_d  k || d ||_1 + || d - v ||^2 / 2."""
    return v.sign() * (v.abs() - k).clamp(min=0)


def descend(M: Map, b: Tensor, x: Tensor, steps: int, apart: bool = False) -> Tensor:
    """``steps`` steps of conjugate gradients on M x = b from x, none of which waits for the device.

    Where what is left is rounding, nothing moves any more: M may be singular, and steps along rounding errors have no bound there.

    Args:
        M: symmetric, positive semi-definite.
        apart: each slice with step lengths of its own, where M does not mix them; else the volume has one.
    """

    def inner(p: Tensor, q: Tensor) -> Tensor:
        return (p * q).flatten(1).sum(1).view(-1, *[1] * (p.ndim - 1)) if apart else (p * q).sum()

    Mx = M(x)
    r = b - Mx
    p, rr = r, inner(r, r)
    least = (10 * torch.finfo(r.dtype).eps) ** 2 * (inner(b, b) + inner(Mx, Mx))
    for _ in range(steps):
        Mp = M(p)
        pMp = inner(p, Mp)
        goes_on = (rr > least) & (pMp > 0)
        alpha = torch.where(goes_on, rr / torch.where(goes_on, pMp, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * Mp
        new = inner(r, r)
        p, rr = r + torch.where(goes_on, new / torch.where(goes_on, rr, 1.0), 0.0) * p, new
    return x


def admm(
    x: Tensor, d: Tensor, u: Tensor, ATA: Map, ATy: Tensor, D: Map, DT: Map, lam: Tensor | float, rho: Tensor | float, steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, d, u) after one iteration for differences D and their adjoint DT (here ``dz`` and ``dz_back``); d and u begin at 0."""
    x = descend(lambda v: ATA(v) + rho * DT(D(v)), ATy + rho * DT(d - u), x, steps)
    ahead = D(x)
    d = soft(ahead + u, lam / rho)
    return x, d, u + ahead - d


def consistent(x: Tensor, ATA: Map, ATy: Tensor) -> Tensor:
    """x + AT (y - A x) / AT A 1, where A sees something.

    Of A whose rows do not overlap and have equal weights exactly the nearest x that explains y."""
    seen = ATA(torch.ones_like(x))
    known = seen > 1e-3 * seen.abs().max()
    return x + torch.where(known, (ATy - ATA(x)) / torch.where(known, seen, 1.0), 0.0)


def largest(ATA: Map, shape: tuple[int, ...], device: torch.device, rounds: int = 20) -> Tensor:
    """|| AT A ||, by the power method from a fixed start; 1 where A is 0. The same for any depth that A does not know of."""
    v = (torch.arange(math.prod(shape), device=device) * GOLDEN % 1).reshape(shape) + 0.1
    for _ in range(rounds):
        v = ATA(v / v.norm().clamp(min=1e-30))
    found = v.norm()
    return torch.where(found > 0, found, 1.0)
