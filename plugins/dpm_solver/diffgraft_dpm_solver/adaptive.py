"""DPM-Solver-12 and -23: every sample chooses its own step sizes, on its device, so that nobody waits for a decision.

A trial of order p takes p denoiser calls, the same ones for all samples: each asks about its own point at its own time. Then each sample
compares its solutions of order p - 1 and p, and goes on or tries again with a smaller step. A sample at the end is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from diffgraft.methods.noise_schedule import DeviceSchedule, precise
from torch import Tensor

from diffgraft_dpm_solver.method import Point, R, Weights, changes, combine, error, first, next_h, weights

TAIL = 4
"""The last 1 / TAIL of the trials: here a sample whose own step would not arrive in time takes even steps instead."""


class Walk:
    """The way of a batch from ``lam`` to ``end``.

    Args:
        x: the samples at ``lam`` [batch, ...], at least float32.
        calls: how many denoiser calls there may be.
        p: order, 2 or 3 (1 where the calls allow no more).
        clean_end: a last call at ``end`` gives x0 (denoise_to_zero).
        together: one step size for all samples, by the largest error, as in the official code.
    """

    def __init__(
        self, x: Tensor, lam: float, end: float, schedule: DeviceSchedule, form: str, p: int, calls: int, clean_end: bool, together: bool,
        h_init: float, atol: float, rtol: float, theta: float,
    ) -> None:  # fmt: skip
        self.schedule, self.form, self.end, self.clean_end, self.together = schedule, form, end, clean_end, together
        self.atol, self.rtol, self.theta = atol, rtol, theta
        self.p = max(1, min(p, calls - clean_end))
        self.trials = (calls - clean_end) // self.p
        self.lam = torch.full((len(x),), lam, dtype=precise(x.device), device=x.device)
        self.h = torch.full_like(self.lam, h_init)
        self.x = self.before = x
        self.running = self.lam < end
        self.done = ~self.running if not clean_end else torch.zeros_like(self.running)
        self.trial = self.stage = 0
        zero = torch.zeros_like(self.lam, dtype=torch.int64)
        self.calls, self.accepted, self.rejected, self.forced = zero, zero, zero, zero
        self._begin_trial()

    def at(self, lam: Tensor) -> Point:
        """Levels [batch]."""
        return Point(*self.schedule.levels(lam), lam)

    def wide(self, value: Tensor) -> Tensor:
        """[batch] as [batch, 1, ...]."""
        return value.reshape(-1, *[1] * (self.x.ndim - 1))

    def _begin_trial(self) -> None:
        left = max(self.trials - self.trial, 1)
        rest = self.end - self.lam
        needed = rest / left if left <= max(1, self.trials // TAIL) else torch.zeros_like(rest)
        self._must = (needed > self.h) | torch.full_like(self.running, left == 1)
        h = torch.minimum(torch.maximum(self.h, needed), rest)
        self._h = torch.where(self.running, h, 1.0)  # the others' points are not used, but are to be numbers
        self._lands = self._h >= rest * (1 - 1e-9)
        self._here = self.lam
        self._points = [self.at(self.lam + r * self._h) for r in (*R[self.p], 1.0)]
        self._m: list[Tensor] = []

    def counts(self) -> dict[str, Tensor]:
        """Per sample [batch]: denoiser calls until its end, trials accepted and rejected, and those taken because the budget ran out."""
        return {"calls": self.calls, "accepted": self.accepted, "rejected": self.rejected, "forced": self.forced}

    @property
    def now(self) -> Point:
        """Where the denoiser is asked [batch]."""
        return self.at(self._here)

    def _weights(self, to: int, change: Any) -> Weights:
        found = weights(self.form, self._points[0], self._points[to], change)
        return Weights(*(self.wide(each).to(self.x.dtype) for each in found))

    def edit(self, change: Tensor) -> None:
        """Somebody has put ``change`` on the sample that was handed out: the sample that the trial began with is moved so that the first
        order of the step takes it there."""
        self.x = self.x + change / torch.where(self.wide(self.running), self._weights(self.stage, 0.0).x, 1.0)

    def take(self, m: Tensor, x0: Tensor) -> Tensor:
        """The prediction at ``now``, in the solver's form and as x0; returns the samples to ask about next."""
        self.calls = self.calls + (~self.done if self.stage == 0 else self.running)
        if self.stage == 0 and self.clean_end:
            arrived = ~self.running & ~self.done
            self.x = torch.where(self.wide(arrived), x0, self.x)
            self.done = self.done | arrived
        self._m.append(m)
        self.stage += 1
        if self.stage < self.p:
            c = changes(self.form, self._h, R[self.p])[self.stage - 1]
            inner = combine(self._weights(self.stage, c), self.x, self._m[0], self._m[-1] if self.stage > 1 else None)
            self._here = torch.where(self.running, self._points[self.stage].lam, self.lam)
            return torch.where(self.wide(self.running), inner, self.x)
        self._decide()
        return self.x

    def _decide(self) -> None:
        p, m = self.p, self._m
        high = combine(self._weights(p, changes(self.form, self._h, R[p])[-1]), self.x, m[0], m[-1] if p > 1 else None)
        if p == 3:
            z = self._h if self.form == "noise" else -self._h
            low = combine(self._weights(p, first(z, R[3][1])), self.x, m[0], m[1])
        else:
            low = combine(self._weights(p, 0.0), self.x, m[0], None)
        E = error(high, low, self.before, self.atol, self.rtol).to(self.lam.dtype)
        if self.together:
            E = E.amax().expand_as(E)
        good = E <= 1
        taken = self.running & (good | self._must)
        self.accepted, self.rejected = self.accepted + (taken & good), self.rejected + (self.running & ~taken)
        self.forced = self.forced + (taken & (~good | (self._must & (self._h > self.h))))
        on = self.wide(taken)
        self.x, self.before = torch.where(on, high, self.x), torch.where(on, low, self.before)
        self.lam = torch.where(taken, torch.where(self._lands, self.end, self.lam + self._h), self.lam)
        self.h = torch.where(self.running, next_h(self._h, E, p, self.theta), self.h)
        self.running = self.running & (self.lam < self.end)
        if not self.clean_end:
            self.done = ~self.running
        self.trial, self.stage = self.trial + 1, 0
        self._begin_trial()


class Seen:
    """A flag of the device, known on the host as soon as it has come over; nobody waits for it."""

    def __init__(self) -> None:
        self.value = False
        self._under_way: tuple[Tensor, Any] | None = None

    def send(self, flag: Tensor) -> None:
        """Take over ``flag`` (0-dim), unless one is under way or it was true."""
        if self.value or not self.arrived():
            return
        if flag.device.type == "cpu":
            self.value = bool(flag)
            return
        event = torch.get_device_module(flag.device).Event()
        self._under_way = flag.to("cpu", non_blocking=True), event
        event.record()

    def arrived(self) -> bool:
        """Whether nothing is under way; what has come is in ``value``."""
        if self._under_way is not None and self._under_way[1].query():
            self.value, self._under_way = bool(self._under_way[0]), None
        return self._under_way is None
