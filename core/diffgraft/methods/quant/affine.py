"""Uniform affine quantisation (Krishnamoorthi, arXiv 1806.08342): the grid, the scales, and the search for a range.

    q = clamp(round(x / delta) + z, lowest, highest)        x_q = delta (q - z)

Zero is always on the grid, so what is padded with zeros stays what it is. All scales are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Over = Literal["tensor", "channel", "token"]
BITS = range(2, 17)
"""Bits that a grid may have; float32 counts to 2^24, so 16 are exact."""
LEAST = torch.finfo(torch.float32).eps
"""Smallest delta."""
SHRINKS = tuple(1 - i / 100 for i in range(80))
"""Shares of the whole range that a search tries."""
TOGETHER = 2**15
"""Elements that a search rounds in one go: as many shares of a small tensor at once as still lie in a cache."""


class Scale(NamedTuple):
    """delta and z (whole numbers), float32, in a shape that broadcasts over what they scale."""

    delta: Tensor
    zero: Tensor


@dataclass(frozen=True)
class UniformAffine:
    """A grid of 2^bits levels.

    bits       2 to 16
    over       what has one scale: a whole "tensor", each "channel" (axis 0: of a weight, one for each output), or each "token" (all axes
               but the last)
    symmetric  z = 0 and levels -2^(b-1) .. 2^(b-1) - 1; else 0 .. 2^b - 1
    """

    bits: int
    over: Over = "tensor"
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits = {self.bits}: {BITS[0]} to {BITS[-1]}")

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return self.lowest + (1 << self.bits) - 1

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(min, max) of each part of x that has one scale, float32, axes kept."""
        axes = {"tensor": range(x.ndim), "channel": range(1, x.ndim), "token": range(x.ndim - 1, x.ndim)}[self.over]
        return x.amin(tuple(axes), keepdim=True).float(), x.amax(tuple(axes), keepdim=True).float()

    def scale(self, low: Tensor, high: Tensor) -> Scale:
        """The scale whose grid spans [min(low, 0), max(high, 0)]."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            delta = (torch.maximum(-low, high) / ((self.highest - self.lowest) / 2)).clamp(min=LEAST)
            return Scale(delta, torch.zeros_like(delta))
        delta = ((high - low) / (self.highest - self.lowest)).clamp(min=LEAST)
        return Scale(delta, (-low / delta).round().clamp(self.lowest, self.highest))

    def quantise(self, x: Tensor, scale: Scale, up: Tensor | None = None) -> Tensor:
        """q, whole numbers in float32; ``up`` (bool) says which elements are rounded up instead of to the nearest."""
        ratio = steps(x, scale)
        whole = ratio.round() if up is None else ratio.floor() + up
        return (whole + scale.zero).clamp(self.lowest, self.highest)

    def rounded(self, x: Tensor, scale: Scale, up: Tensor | None = None) -> Tensor:
        """x_q in x's dtype."""
        return dequantise(self.quantise(x, scale, up), scale).to(x.dtype)

    def through(self, x: Tensor, scale: Scale) -> Tensor:
        """x_q as :meth:`rounded` gives it, with a gradient: to x where it is not cut off, and to delta (Esser et al., arXiv 1902.08153)."""
        ratio = steps(x, scale)
        whole = ratio.detach().round() + (ratio - ratio.detach())
        return dequantise((whole + scale.zero).clamp(self.lowest, self.highest), scale).to(x.dtype)


def steps(x: Tensor, scale: Scale) -> Tensor:
    """x / delta, float32, by way of 1 / delta as torchao has it: the end of a symmetric range lies just between two levels, and falls to
    the same one only so."""
    return x.float() * (1 / scale.delta)


def dequantise(q: Tensor, scale: Scale) -> Tensor:
    """x_q = delta (q - z)."""
    return (q - scale.zero) * scale.delta


def nearest_scale(x: Tensor, grid: UniformAffine) -> Scale:
    """The scale of the whole range of x."""
    return grid.scale(*grid.ends(x))


def searched_scale(x: Tensor, grid: UniformAffine, p: float = 2.4) -> Scale:
    """The scale of the shrunk range whose mean ``|x - x_q|^p`` is least, for each channel (or the tensor) its own.

    Source: LAPQ (arXiv 1911.07190), with Q-Diffusion's shares 1, .99 ... .21 of the range and p = 2.4.
    """
    low, high = grid.ends(x)
    axes = tuple(axis for axis in range(-x.ndim, 0) if low.shape[axis] == 1)
    x = x.float()
    best, least = grid.scale(low, high), torch.full_like(low, torch.inf)
    shares = torch.tensor(SHRINKS, dtype=torch.float32, device=x.device).reshape(-1, *(1,) * x.ndim)
    for some in shares.split(max(1, TOGETHER // max(1, x.numel()))):
        scale = grid.scale(some * low, some * high)
        error = (x - grid.rounded(x, scale)).abs().pow(p)
        error, at = (error.mean(axes, keepdim=True) if axes else error).min(0)
        better = error < least
        least = torch.where(better, error, least)
        best = Scale(*(torch.where(better, new.gather(0, at[None])[0], old) for new, old in zip(scale, best, strict=True)))
    return best


def at_index(x: Tensor, at: Tensor | int) -> Tensor:
    """x[at] without waiting for the device."""
    return x[at] if isinstance(at, int) else x.index_select(0, at.reshape(1)).squeeze(0)


def moved(module: T, fn: Any, but: frozenset[str] | set[str] = frozenset()) -> T:
    """Move a module's buffers as ``Module._apply`` does, but leave them in float32: a delta of 8 bits is off by half a level of 256."""
    buffers: dict[str, Tensor | None] = module._buffers  # type: ignore[attr-defined]
    for name, value in buffers.items():
        if value is not None and name not in but:
            buffers[name] = value.to(fn(value.new_zeros(1)).device)
    return module
