"""The algebra of a bank for one layer, on factors alone: no matrix of the layer's own size is ever made.

Symbols: dW_i = B_i A_i the update of LoRA i with its scale in B_i [out, r_i], A_i [r_i, in] (a convolution's kernel is part of `in`);
N LoRA, p < N basis updates D_k of rank r', coefficients c [N, p]:

    min over c, D of  sum_i || dW_i - sum_k c_ik D_k ||_F^2                                                                            (1)

Stack vec(dW_i) as rows: (1) is its truncated SVD, and that follows from the N x N Gram matrix (2), whose entries need r x r products only.
All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = 1e-7
"""Singular values below this share of the layer's largest are rounding of the LoRA themselves, and not kept."""


class Update(NamedTuple):
    """dW = B A: B [out, r], A [r, in]."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def inner(x: Update, y: Update) -> Tensor:
    """<x, y> = tr((B_x^T B_y) (A_y A_x^T)), of r x r products."""
    return ((x.B.T @ y.B) * (x.A @ y.A.T)).sum()


def gram(xs: Sequence[Update], ys: Sequence[Update] | None = None) -> Tensor:
    """G_ij = <x_i, y_j>; of ``xs`` with themselves where there are no others (2)."""
    return torch.stack([torch.stack([inner(x, y) for y in (xs if ys is None else ys)]) for x in xs])


def eigenvectors(G: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """(V [N, p], lambda [N]): the p first eigenvectors of G, all its eigenvalues falling; each vector's largest entry is positive.

    c = V and D_k = sum_i V_ik dW_i minimise (1), and what is left is the sum of lambda_k over k > p (Eckart, Young).
    """
    values, vectors = torch.linalg.eigh(G)
    V = vectors.flip(1)[:, :p]
    signs = V.gather(0, V.abs().argmax(0, keepdim=True)).sign()
    return V * signs, values.flip(0).clamp(min=0)


def combination(xs: Sequence[Update], weights: Tensor) -> Update:
    """sum_i w_i x_i with the ranks side by side: sum r_i of them."""
    return Update(torch.cat([w * x.B for w, x in zip(weights, xs, strict=True)], 1), torch.cat([x.A for x in xs]))


def core(x: Update) -> tuple[Tensor, Tensor, Tensor]:
    """(Q_B, M, Q_A) with B A = Q_B M Q_A^T, both Q orthonormal: M has the singular values and the norm of B A, and the size of its rank."""
    Q_B, R_B = torch.linalg.qr(x.B)
    Q_A, R_A = torch.linalg.qr(x.A.T)
    return Q_B, R_B @ R_A.T, Q_A


def recompressed(x: Update, rank: int | None, least: float = 0.0) -> Update:
    """The nearest update of at most this rank (None: any), by QR and a small SVD; singular values up to ``least`` are left out."""
    Q_B, M, Q_A = core(x)
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    kept = min(int((s > least).sum()), len(s) if rank is None else rank)
    half = s[:kept].sqrt()
    return Update(Q_B @ (U[:, :kept] * half), (half[:, None] * Vh[:kept]) @ Q_A.T)


def norm(x: Update) -> float:
    """||B A||_F; without the cancellation that <x, x> has in a small difference of large updates."""
    return float(torch.linalg.matrix_norm(core(x)[1])) if x.rank else 0.0


def coefficients(xs: Sequence[Update], basis: Sequence[Update]) -> Tensor:
    """c [N, p] that minimise (1) for a basis that is given, such as one of cut ranks; V itself for the uncut one."""
    return (torch.linalg.pinv(gram(basis), hermitian=True) @ gram(basis, xs)).T


def residual(x: Update, basis: Sequence[Update], c: Tensor) -> float:
    """|| x - sum_k c_k D_k ||_F."""
    return norm(combination([x, *basis], torch.cat([torch.ones(1, dtype=c.dtype), -c])))


def basis_of(xs: Sequence[Update], p: int, rank: int | None) -> list[Update]:
    """D_k, k < p, each recompressed to a rank; a basis update that is nothing has rank 0."""
    V, values = eigenvectors(gram(xs), p)
    least = NOTHING * float(values[0].sqrt())
    return [recompressed(combination(xs, V[:, k]), rank, least) for k in range(p)]


def alone(xs: Sequence[Update], budget: int) -> list[Update]:
    """The plain alternative: each LoRA cut by its own SVD, with ``budget`` ranks of all together given to the largest singular values."""
    values = [torch.linalg.svdvals(core(x)[1]) if x.rank else x.A.new_zeros(0) for x in xs]
    whose = torch.cat([torch.full((len(s),), i) for i, s in enumerate(values)])
    first = torch.cat(values).argsort(descending=True, stable=True)[:budget]
    return [recompressed(x, int((whose[first] == i).sum())) for i, x in enumerate(xs)]


def rows(xs: Tensor, p: int) -> Tensor:
    """The paper's own basis, as far as we know it: ``xs`` [positions, N, r] are the rows of one factor of all LoRA; at each position the N
    vectors of R^r are replaced by their best p-dimensional approximation. It keeps p (r + N) numbers a position of N r."""
    U, s, Vh = torch.linalg.svd(xs, full_matrices=False)
    return (U[..., :p] * s[..., None, :p]) @ Vh[..., :p, :]
