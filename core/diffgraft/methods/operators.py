"""Inverse problems: y = A(x) + noise. What a measurement does to a picture, as an operator with its adjoint, inverse and proximal map.

    class EveryOther(Operator):                     # a user's own: A, and of which x a y is
        def A(self, x):
            return x[..., ::2]

        def domain(self, y):
            return (*y[:-1], 2 * y[-1])

    blurred_and_small = Downsample(4) @ Blur(1.5)

Pictures are x [n, c, h, w] and videos [n, c, frames, h, w], in [-1, 1]. The adjoint of a linear operator that gives none is made by
autograd, its inverse and proximal map by conjugate gradients; a closed form that a class knows takes their place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.installed.errors import ConfigError, Unsupported

Shape = tuple[int, ...]


class Operator:
    """A, from pictures to measurements.

    linear  whether A(a x + b z) = a A(x) + b A(z): only then are there an adjoint, an inverse and a proximal map
    """

    linear: bool = True

    def A(self, x: Tensor) -> Tensor:
        """The measurement of x [n, c, ..., h, w], without noise."""
        raise NotImplementedError

    def domain(self, y: Shape) -> Shape:
        """The shape of the pictures whose measurement has the shape ``y``; the same, where a class does not say."""
        return y

    def AT(self, y: Tensor) -> Tensor:
        """The adjoint: <A x, y> = <x, AT y>.

        Raises:
            Unsupported: A is not linear.
        """
        self._ensure_linear("adjoint")
        with torch.inference_mode(False), torch.enable_grad():  # of a linear map: no method that has none of its own loses anything
            x = torch.zeros(self.domain(tuple(y.shape)), dtype=y.dtype, device=y.device, requires_grad=True)
            (given,) = torch.autograd.grad(self.A(x), x, y.clone())
        return given

    def pinv(self, y: Tensor) -> Tensor:
        """The x of least norm among those with the least || A x - y ||.

        Raises:
            Unsupported: A is not linear.
        """
        self._ensure_linear("inverse")
        return conjugate_gradients(lambda x: self.AT(self.A(x)), self.AT(y))

    def prox(self, x: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """argmin_z  || A z - y ||^2 / 2 + || z - x ||^2 / (2 gamma).

        Args:
            gamma: above 0; the larger, the nearer to the measurement.

        Raises:
            Unsupported: A is not linear.
        """
        self._ensure_linear("proximal map")
        return conjugate_gradients(lambda z: gamma * self.AT(self.A(z)) + z, x + gamma * self.AT(y), start=x)

    def __matmul__(self, inner: Operator) -> Operator:
        """First ``inner``, then this one."""
        if not isinstance(inner, Operator):
            return NotImplemented
        return Composed(self, inner)

    def to(self, device: torch.device, dtype: torch.dtype) -> Operator:
        """A copy whose tensors are where the pictures are, and in their dtype."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else dtype.to_complex() if t.is_complex() else None)

        new = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(new, name, moved(value))
            elif isinstance(value, Operator):
                setattr(new, name, value.to(device, dtype))
            elif isinstance(value, nn.Module):  # a copy, as it moves where it is; not by `to`, which cuts complex numbers
                setattr(new, name, copy.deepcopy(value)._apply(moved))
        return new

    def _ensure_linear(self, what: str) -> None:
        if not self.linear:
            raise Unsupported(f"{type(self).__name__} is not linear and has no {what}: take a method that asks A and its gradient only")


class Rows(Operator):
    """A linear operator whose rows are orthogonal and equally long: A AT = c on what can be measured. Inverse and proximal map are closed.

    c  the squared length of a row
    """

    c: float = 1.0

    def pinv(self, y: Tensor) -> Tensor:
        return self.AT(y) / self.c

    def prox(self, x: Tensor, y: Tensor, gamma: float | Tensor) -> Tensor:
        """By the matrix inversion lemma: x + gamma / (1 + gamma c) AT(y - A x)."""
        return x + gamma / (1 + gamma * self.c) * self.AT(y - self.A(x))


class Composed(Operator):
    """``outer(inner(x))``."""

    def __init__(self, outer: Operator, inner: Operator) -> None:
        self.outer, self.inner = outer, inner
        self.linear = outer.linear and inner.linear

    def A(self, x: Tensor) -> Tensor:
        return self.outer.A(self.inner.A(x))

    def AT(self, y: Tensor) -> Tensor:
        return self.inner.AT(self.outer.AT(y))

    def domain(self, y: Shape) -> Shape:
        return self.inner.domain(self.outer.domain(y))


class Physics(Operator):
    """A deepinv ``LinearPhysics`` (or any object that has ``A`` and ``A_adjoint``), as it is.

    Args:
        shape: of one x without its first axis. Where None, that of ``physics.img_size``, or of what ``A_adjoint`` makes of a measurement.
    """

    def __init__(self, physics: Any, shape: Sequence[int] | None = None) -> None:
        shape = shape or getattr(physics, "img_size", None)
        self.physics, self.shape = physics, None if shape is None else tuple(shape)
        self.linear = callable(getattr(physics, "A_adjoint", None))

    def A(self, x: Tensor) -> Tensor:
        return self.physics.A(x)  # type: ignore[no-any-return]

    def AT(self, y: Tensor) -> Tensor:
        self._ensure_linear("adjoint")
        return self.physics.A_adjoint(y)  # type: ignore[no-any-return]

    def domain(self, y: Shape) -> Shape:
        if self.shape is None and self.linear:
            self.shape = tuple(self.to(torch.device("cpu"), torch.float32).AT(torch.zeros(y)).shape[1:])
        return y if self.shape is None else (y[0], *self.shape)


def as_operator(value: Any, knob: str = "operator") -> Operator:
    """An operator: one of ours, or somebody's with the methods ``A`` and, where it is linear, ``A_adjoint``.

    Raises:
        ConfigError: it is neither.
    """
    if isinstance(value, Operator):
        return value
    if callable(getattr(value, "A", None)) and not isinstance(value, type):
        return Physics(value)
    told = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    raise ConfigError(f"{knob} = {told}: give a diffgraft.methods.operators.Operator, or an object with A(x) and A_adjoint(y)")


def inner(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of each sample [n, 1, 1, ...]."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def conjugate_gradients(
    M: Callable[[Tensor], Tensor], b: Tensor, start: Tensor | None = None, steps: int = 200, tolerance: float = 1e-6
) -> Tensor:
    """x with M x = b for each sample, M symmetric and positive (semi-)definite; in float32 at least, and the same in any unit of b and M.

    From ``start`` None, which is 0, the solution of least norm. Ends at || M x - b || <= tolerance || b ||, looked at every ten steps, or
    after ``steps``: of a badly conditioned M, such as a wide blur's, what is left then is not small.
    """
    dtype = torch.promote_types(b.dtype, torch.float32)
    b32 = b.to(dtype)
    largest = b32.abs().flatten(1).amax(1).view(-1, *[1] * (b.ndim - 1))
    unit = torch.where(largest > 0, largest, 1.0)  # squares of what is small, or large, are no numbers any more
    b32 = b32 / unit
    x = torch.zeros_like(b32) if start is None else start.to(dtype) / unit
    r = b32.clone() if start is None else b32 - M(x.to(b.dtype)).to(dtype)
    p, rr = r, inner(r, r)
    enough = tolerance**2 * inner(b32, b32)
    for k in range(steps):
        if k % 10 == 0 and bool((rr <= enough).all()):  # check: allow host_sync because ten steps are cheaper than a look at each
            break
        Mp = M(p.to(b.dtype)).to(dtype)
        pMp = inner(p, Mp)
        goes_on = (rr > enough) & (pMp > 0)
        alpha = torch.where(goes_on, rr / torch.where(goes_on, pMp, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * Mp
        new = inner(r, r)
        p, rr = r + torch.where(goes_on, new / torch.where(goes_on, rr, 1.0), 0.0) * p, new
    return (x * unit).to(b.dtype)


def dot_test(operator: Operator, y: Shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> float:
    """``|<A x, y> - <x, AT y>| / (||A x|| ||y||)`` of random x and y: 0 for a true adjoint.

    Args:
        y: the shape of a measurement.
    """
    draws, operator = torch.Generator().manual_seed(seed), operator.to(torch.device("cpu"), dtype)
    b = torch.randn(y, generator=draws, dtype=torch.float64).to(dtype)
    x = torch.randn(operator.domain(y), generator=draws, dtype=torch.float64).to(dtype)
    Ax, ATb = operator.A(x), operator.AT(b)
    size = float(Ax.norm() * b.norm())
    return float((inner(Ax, b) - inner(x, ATb)).abs().max()) / size if size > 0 else float(ATb.norm() > 0)
