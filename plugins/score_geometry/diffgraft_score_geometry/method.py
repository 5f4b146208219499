"""The mathematics: how far a score is from a gradient, and how many directions the data have around a point.

A noisy sample is x = a x0 + s eps. The denoiser says the mean D(x) = E[x0 | x] and the noise eps(x) = (x - a D(x)) / s; the score is
-eps(x) / s. Both are linear in x and in the network's output, so what a Jacobian makes of a vector goes through the same formulas.
J is the Jacobian of eps. Where data lie on a manifold of dimension k and s is small, a dD/dx = I - s J is the projection onto its tangent
space: k singular values near 1, the others near 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inner(u: Tensor, v: Tensor) -> Tensor:
    """<u, v> over all axes but the first, in float64: [n, ...] -> [n]."""
    return (u.double() * v.double()).flatten(1).sum(1)


# conservativity -------------------------------------------------------------------------------------------------------------------


def parts(ju: Tensor, jtu: Tensor) -> tuple[Tensor, Tensor]:
    """|(J - J^T) u|^2 and |(J + J^T) u|^2 [n] of J u and J^T u [n, ...].

    Over u ~ N(0, I) their means are the squared Frobenius norms of J - J^T and J + J^T (Hutchinson). A gradient's J is symmetric.
    """
    apart, together = ju - jtu, ju + jtu
    return inner(apart, apart), inner(together, together)


def asymmetry(anti: Tensor, sym: Tensor) -> tuple[Tensor, Tensor]:
    """|J - J^T| / |J + J^T| [n] and its standard error (jackknife over the probes; NaN for a single one).

    Args:
        anti, sym: what :func:`parts` gave for each probe [probes, n].
    """
    probes = len(anti)
    ratio = (anti.sum(0) / sym.sum(0)).sqrt()
    if probes == 1:
        return ratio, torch.full_like(ratio, torch.nan)
    without = ((anti.sum(0) - anti) / (sym.sum(0) - sym)).sqrt()
    return ratio, ((probes - 1) / probes * (without - without.mean(0)).square().sum(0)).sqrt()


# dimension around a point ---------------------------------------------------------------------------------------------------------


def trace_dimension(u: Tensor, pu: Tensor) -> tuple[Tensor, Tensor]:
    """tr P [n] and its standard error, of u and P u = (I - s J) u [probes, n, ...]: the dimension where P is a projection.

    The variance of one probe is 2 |P|^2 = 2 k: of I - s J, and not of J, whose trace has the variance of all d - k other directions.
    """
    values = torch.stack([inner(one, other) for one, other in zip(u, pu, strict=True)])
    spread = values.std(0) if len(values) > 1 else torch.full_like(values[0], torch.nan)
    return values.mean(0), spread / len(values) ** 0.5


def singular_values(vectors: Tensor) -> Tensor:
    """Of the matrix with these columns [m, n, ...]: [n, min(m, d)], largest first, in float64; NaN where the denoiser overflowed."""
    return where_finite(torch.linalg.svdvals, vectors.double().flatten(2).movedim(0, 1))


def where_finite(spectrum: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """The spectrum [n, m] of matrices [n, ., .], NaN for those that are not finite: the solvers raise for these."""
    finite = matrices.isfinite().all(2).all(1)
    return spectrum(matrices.where(finite[:, None, None], 0)).where(finite[:, None], torch.nan)


def leading(values: Tensor) -> Tensor:
    """How many singular values of a flow's Jacobian [n, m] (largest first) do not vanish, [n]: those before the largest ratio of two.

    0 where they are not finite.
    """
    tiny = torch.finfo(values.dtype).tiny
    return ((values[:, :-1] / values[:, 1:].clamp(min=tiny)).argmax(1) + 1) * values.isfinite().all(1)


def score_spectrum(gram: Tensor, points: int) -> Tensor:
    """Singular values [n, d], largest first, of the stacked s x score at ``points`` noisy points, divided by sqrt(points).

    In a normal direction the score points back to the manifold: about 1. Along the manifold: about 0.

    Args:
        gram: sum over the points of eps eps^T [n, d, d], float64.
    """
    return where_finite(torch.linalg.eigvalsh, gram / points).clamp(min=0).sqrt().flip(1)


def score_dimension(values: Tensor, points: int) -> Tensor:
    """The dimension [n]: how many singular values [n, d] (largest first) come after the largest fall; 0 where there is none to count.

    That is the rule of Stanczuk et al. (arXiv 2212.12611), Algorithm 1, with one exception. The d - k normal directions have values around
    1, at most 1 + sqrt(d / points) because the points are random (Marchenko and Pastur). What is larger is no direction of the data: a
    mistake that a network makes at all points alike adds up to one large value. So a fall from above that edge, with 5 % for chance,
    does not count.
    """
    edge = 1.05 * (1 + (values.shape[1] / points) ** 0.5)
    falls = (values[:, :-1] - values[:, 1:]).where(values[:, :-1] <= edge, -torch.inf)
    return (values.shape[1] - 1 - falls.argmax(1)) * (falls > -torch.inf).any(1)
