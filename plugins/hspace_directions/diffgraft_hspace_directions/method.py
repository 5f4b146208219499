"""Directions of h-space and what is done with them, in the papers' symbols; free of diffusers.

h_t is what the mid block of a U-Net returns at step t. An edit adds a direction to it, h_t + gamma n_t, and runs the rest of the network.

* **PCA** of h_t over samples (Haas et al.): n_t = std_k(t) u_k(t), so that gamma counts standard deviations;
* **Jacobian** of one sample: J = d eps / d h_t, n_t = sigma_k v_k of its singular value decomposition, by subspace iteration
  on J^T J: no matrix of that size is ever built;
* **Asyrp** (Kwon et al.): x_{t-1} = a' P_t(eps edited) + d D_t(eps), the clean sample from the edited prediction, the way back to
  x_t from the plain one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """``mean`` [T, ...]; ``unit`` [K, T, ...]; ``std`` and ``share`` (of the variance) [K, T], largest first."""

    mean: Tensor
    unit: Tensor
    std: Tensor
    share: Tensor


def pca(h: Tensor, most: int, together: bool = False) -> Components:
    """Principal components of h [T, n, ...] over its n samples: min(``most``, n - 1) of them, at least one (which is 0 for n = 1).

    By the n x n matrix of inner products, in float64 (n is far below the size of h). The sign of each component is that in which its
    largest element at step 0 is positive; at later steps that of a positive inner product with step 0.

    Args:
        together: components of the whole trajectory (of norm 1 over all steps together) instead of each step's own.
    """
    T, n = h.shape[:2]
    mean = h.double().mean(1)
    X = (h.double() - mean[:, None]).flatten(2)
    gram = X @ X.mT
    if together:
        gram = gram.sum(0, keepdim=True).expand(T, -1, -1)
    K = max(1, min(most, n - 1))
    values, vectors = torch.linalg.eigh(gram)
    values, V = values.flip(1)[:, :K].clamp(min=0), vectors.flip(2)[:, :, :K]
    s = values.sqrt()
    total = gram.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    tiny = torch.finfo(s.dtype).tiny
    fits = values > 1e-12 * total  # behind the data's rank there is no direction
    unit = (V.mT @ X) / s.clamp(min=tiny)[:, :, None] * fits[:, :, None]
    if together:
        unit = unit * largest_positive(unit.movedim(1, 0).flatten(1))[None, :, None]
    else:
        unit = unit * largest_positive(unit.flatten(0, 1)).view(T, K, 1)
        along = (unit * unit[:1]).sum(2, keepdim=True)
        unit = torch.where(along < 0, -unit, unit)
    std = s * fits / max(n - 1, 1) ** 0.5
    share = values * fits / total.clamp(min=tiny)
    return Components(mean, unit.movedim(1, 0).unflatten(2, h.shape[2:]), std.mT, share.mT)


def largest_positive(rows: Tensor) -> Tensor:
    """The sign [m] with which the largest element of each row [m, d] is positive; 1 for rows of zeros."""
    sign = rows.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0].sign()
    return torch.where(sign == 0, 1, sign)


def singular_directions(
    J: Callable[[Tensor], Tensor], Jt: Callable[[Tensor], Tensor], start: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """The first k right singular vectors [k, n, d] of n matrices and their singular values [k, n].

    Subspace iteration on J^T J, which is the power iteration for k = 1: V <- orth(J^T J V); at the end the directions inside the subspace
    are told apart by the k x k matrix (J V)^T (J V). 2 k ``iterations`` + k products.

    Args:
        J, Jt: products with n vectors [n, d] at once: a denoiser does not mix the samples of a batch.
        start: [k, n, d], any independent vectors.
    """
    V = orthonormal(start)
    for _ in range(iterations):
        V = orthonormal(torch.stack([scaled(Jt, J(v)) for v in V]))
    U = torch.stack([J(v) for v in V]).double()
    if len(V) == 1:
        return V, U.norm(dim=2).to(V.dtype)
    values, turn = torch.linalg.eigh(torch.einsum("knd,lnd->nkl", U, U))
    V = torch.einsum("nkl,knd->lnd", turn.flip(2).to(V.dtype), V)
    return V, values.flip(1).clamp(min=0).sqrt().mT.to(V.dtype)


def scaled(Jt: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    """J^T u by way of unit vectors, so that 16 bits do not overflow."""
    norm = u.flatten(1).norm(dim=1).clamp(min=torch.finfo(u.dtype).tiny)
    return Jt(u / norm.view(-1, *[1] * (u.ndim - 1))) * norm[:, None]


def orthonormal(V: Tensor) -> Tensor:
    """[k, n, d] with orthonormal vectors for each of the n, spanning the same spaces; the first keeps its direction.

    Gram and Schmidt, twice for each vector: as good as QR for a few, and it does not wait for the device.
    """
    found: list[Tensor] = []
    for v in V:
        for _ in range(2):
            for u in found:
                v = v - (u * v).sum(1, keepdim=True) * u
            v = v / v.norm(dim=1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        found.append(v)
    return torch.stack(found)


def same_sense(V: Tensor, before: Tensor | None) -> Tensor:
    """V [k, n, d] with the signs of a positive inner product with ``before``; without it, with those of a positive largest element."""
    sign = largest_positive(V.flatten(0, 1)).view(V.shape[:2]) if before is None else torch.where((V * before).sum(2) < 0, -1, 1)
    return V * sign[..., None]


def stretch(a: Tensor, s: Tensor, a_next: Tensor, d: Tensor) -> Tensor:
    """k of Asyrp as one prediction, eps + k (eps_edited - eps), for a sample a x_0 + s eps that is brought to a' x_0 + d eps.

    x_{t-1} = a' (x - s eps_edited) / a + d eps is DDIM's step, a' (x - s e) / a + d e, with that e for k = a' s / (a' s - a d). At the
    end of a schedule (d = 0) k = 1, which is the symmetric edit; before that it is larger. A step that stays at its noise level
    (a' s = a d, the last one of some schedules) takes every e to the same sample: no k is Asyrp there, and 0 is given, the plain step.
    """
    rest = a_next * s - a * d
    stays = rest.abs() <= 1e-5 * a_next * s
    return torch.where(stays, 0.0, a_next * s / torch.where(stays, 1.0, rest))


def direction_level(a: Tensor, s: Tensor, a_next: Tensor, s_next: Tensor, eta: float) -> Tensor:
    """d = sqrt(s'^2 - sigma_t^2), the factor of D_t under DDIM's eta: sigma_t = eta (s' / s) sqrt(1 - a^2 / a'^2)."""
    return (s_next**2 - (eta * s_next / s) ** 2 * (1 - (a / a_next) ** 2)).clamp(min=0).sqrt()
