"""Which model runs a step (T-Stitch, arXiv 2402.14167, section 3), without models.

r_1, ..., r_m are the shares of the small models, smallest first; the large model has the rest, so all shares together are 1. A part ends
at the cumulative share R_k = r_1 + ... + r_k. Steps are solver steps i = 0 ... T - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

NEAR = 1e-9
"""Rounding of sums of decimal shares: 0.1 + 0.2 is 0.3."""


def cumulative(r: Sequence[float]) -> tuple[float, ...]:
    """R_1, ..., R_m: the share of the trajectory at which each small model's part ends."""
    return tuple(min(1.0, total) for total in accumulate(r))


def ends_by_steps(r: Sequence[float], T: int) -> tuple[int, ...]:
    """How many of ``T`` steps are over when each small model's part ends: step i belongs to it if (i + 1) / T <= R.

    No model runs more than its share (the authors' SD, SDXL and ControlNet pipelines).
    """
    return tuple(int(R * T + NEAR) for R in cumulative(r))


def ends_by_begin(r: Sequence[float], T: int) -> tuple[int, ...]:
    """The same where step i belongs to a part if i / T <= R, so that a part runs up to one step more than its share.

    As in the authors' LCM pipeline, R = 0 is no step at all.
    """
    return tuple(min(T, int(R * T + NEAR) + 1) if R > 0 else 0 for R in cumulative(r))


def ends_by_time(r: Sequence[float], t: Sequence[float], T_train: float) -> tuple[int, ...]:
    """The same where a step belongs to a part if its timestep has t / T_train >= 1 - R (the authors' DiT code).

    ``t`` [T] are the timesteps of the run, falling. R = 0 is no step at all, also where t = T_train occurs (flow models). The rule is that
    of decimals: a step at t = (1 - R) T_train belongs to the part. In the authors' floats 300 / 1000 >= 1 - 0.7 is false.
    """
    return tuple(sum(value >= (1 - R) * T_train - 1e-6 * T_train for value in t) if R > 0 else 0 for R in cumulative(r))


def model_at(i: int, ends: Sequence[int]) -> int:
    """Number of the model that runs step ``i``: 0 is the smallest, ``len(ends)`` the large one."""
    return next((number for number, end in enumerate(ends) if i < end), len(ends))
