"""What is added to the mid block's output in one denoiser call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffgraft import ConfigError, DenoiseCall, Unsupported
from diffgraft.methods.gradients import alone, jvp_of, predict_alone, vjp_of
from diffgraft.methods.predictions import known_kind, levels_of, noise_estimate
from diffgraft.methods.solvers import at_least_float32
from torch import Tensor


@dataclass
class Edit:
    """gamma n for a call of ``rows`` rows in ``branches``.

    ``unit`` directions of norm 1 [1 or B, R, C, H, W], float32 (None: one that is drawn when the shape of h is seen); ``size`` [1 or B]
    what they are multiplied with, None for the norm of h itself.
    """

    gamma: float
    unit: Tensor | None
    size: Tensor | None
    branches: tuple[str, ...]
    rows: int
    only_cond: bool
    knob: str = "artefact"
    """Where the direction comes from, for an error."""

    def on(self, h: Tensor) -> Tensor:
        """h [branches x B x R, C, H, W] with the direction added."""
        assert self.unit is not None
        parts, (of, frames, *rest) = len(self.branches), self.unit.shape
        if h.shape[0] != self.rows * frames or list(h.shape[1:]) != rest or of not in (1, self.rows // parts):
            raise ConfigError(
                f"plugin 'hspace_directions': {self.knob} is for h of shape {shape_of(self.unit.shape)}, and the mid block gave "
                f"{shape_of((of, h.shape[0] // self.rows, *h.shape[1:]))} for a sample: take one of this size"
            )
        x = h.float().view(parts, -1, *self.unit.shape[1:])
        delta = self.gamma * self.unit
        if self.size is None:
            delta = delta * x.flatten(2).norm(dim=2).view(*x.shape[:2], 1, 1, 1, 1)
        else:
            delta = delta * self.size.view(-1, 1, 1, 1, 1)
        delta = delta.expand_as(x)
        if self.only_cond:
            edited = torch.tensor([branch in ("cond", "skip") for branch in self.branches])  # an extra call has the conditional's inputs
            delta = delta * edited.to(h.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1))
        return h + delta.reshape(h.shape).to(h.dtype)


def shape_of(unit: Sequence[int]) -> tuple[int, ...]:
    """Of h of one sample, of [samples, R, C, H, W]: with frames only where there are several."""
    return tuple(unit[2:] if unit[1] == 1 else unit[1:])


@dataclass
class Shared:
    """Kept in one run: what the hook of the mid block is to do, the direction of each denoiser call, and what the Jacobian gave."""

    edit: Edit | None = None
    watching: bool = False
    replaced: Tensor | None = None
    """What the mid block hands out instead, in a Jacobian product."""
    h: Tensor | None = None
    units: tuple[Tensor, Tensor] | None = None
    """[T, R, C, H, W] of norm 1, and their sizes [T], on the device."""
    random: Tensor | None = None
    """[1, R, C, H, W] of norm 1."""
    V: Tensor | None = None
    """The Jacobian's directions [k, B, d] of step ``taken``, with their singular values [k, B] and the shape of h of a sample."""
    sigma: Tensor | None = None
    form: tuple[int, ...] = ()
    taken: int = -1
    values: list[Tensor] = field(default_factory=list)


class MidJacobian:
    """J = d eps / d h of the samples of one denoiser call, past the other plugins: products with vectors [B, d]."""

    def __init__(self, call: DenoiseCall, shared: Shared) -> None:
        self.call, self.shared = call, shared
        self.dtype = at_least_float32(call.sample.dtype)
        x, levels = call.latents, levels_of(call)
        kind = known_kind(call.family, call.pipe.scheduler)
        one = torch.ones((), dtype=self.dtype, device=x.device)
        nothing = torch.zeros_like(one)
        self.factor = noise_estimate(nothing, one, type(levels)(*(each.to(self.dtype) for each in levels)), kind)
        """d eps / d output"""
        self.axis = call.family.channel_axis
        self.channels = x.shape[self.axis]
        shared.watching = True
        try:
            with alone(call), torch.no_grad():
                predict_alone(call)
        finally:
            shared.watching = False
        if shared.h is None:
            raise Unsupported("hspace_directions: the denoiser was asked past its mid block, so there is no Jacobian of it")
        self.h, shared.h = shared.h, None
        self.samples = len(call.sample)
        self.form_of_h = (len(self.h) // self.samples, *self.h.shape[1:])
        """[R, C, H, W], of one sample."""

    def predict(self, h: Tensor) -> Tensor:
        """The prediction [B, ...] when the mid block hands out ``h``, without a learned variance."""
        self.shared.replaced = h
        try:
            out = predict_alone(self.call)
        finally:
            self.shared.replaced = None
        return out.narrow(self.axis, 0, min(self.channels, out.shape[self.axis]))

    def times(self, v: Tensor) -> Tensor:
        """J v [B, prediction's size]."""
        out = jvp_of(self.call, self.predict, self.h, v.view(self.h.shape).to(self.h.dtype))
        self.form = out.shape
        return out.flatten(1).to(self.dtype) * self.factor

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u [B, d], after a product with J."""
        back = vjp_of(self.call, self.predict, self.h, u.view(self.form).to(self.h.dtype))
        return back.reshape(self.samples, -1).to(self.dtype) * self.factor


def random_rows(number: int, size: int, seed: int) -> Tensor:
    """Standard normal [number, size]."""
    return torch.randn(number, size, generator=torch.Generator().manual_seed(seed))


def random_unit(shape: Sequence[int], seed: int) -> Tensor:
    """A random direction of norm 1 [1, *shape]."""
    drawn = random_rows(1, math.prod(shape), seed)
    return (drawn / drawn.norm()).view(1, *shape)
