"""The times of a run: FLAIR's own, of the model's raw t."""

from __future__ import annotations

from typing import Any

import torch
from diffgraft import Family, Schedule, Unsupported
from diffgraft.methods.predictions import is_flow
from diffgraft.methods.restoring import ensure_one_call_a_step
from diffgraft.methods.starts import follows
from torch import Tensor


def ensure_flow(plugin: str, family: Family, scheduler: Any, schedules: bool) -> None:
    """Refuse what is no flow, asks more than once for a step, or, where it must, follows no other times than its own.

    Raises:
        Unsupported: with the way out.
    """
    name = type(scheduler).__name__
    if not is_flow(family, scheduler) or getattr(scheduler, "sigmas", None) is None:
        raise Unsupported(f"{plugin} is for flow models, whose samples are (1 - t) x0 + t n, and {name} has others; use red_diff")
    ensure_one_call_a_step(plugin, family, scheduler)
    if scheduler.config.get("invert_sigmas"):
        raise Unsupported(f"{plugin}: {name} with invert_sigmas counts its levels upwards; leave that off")
    if schedules and not follows(scheduler):
        raise Unsupported(f"{plugin}: {name} follows no times but its own; use FlowMatchEuler, or t_min = None")


def times(steps: int, t_min: float) -> Tensor:
    """t [steps], evenly from 1 down to ``t_min``, neither of which is one of them."""
    return torch.linspace(1, t_min, steps + 2)[1:-1]


def even(scheduler: Any, own: Schedule, t: Tensor) -> Schedule:
    """The schedule that asks the denoiser at these t, whatever shift the scheduler has, and ends in a clean sample."""
    assert own.sigmas is not None  # of a flow scheduler
    t = t.to(own.sigmas)
    timesteps = t * scheduler.config.num_train_timesteps
    if not own.timesteps.is_floating_point():  # UniPC, DPM++
        timesteps = timesteps.round()
    return Schedule(timesteps.to(own.timesteps), torch.cat([t, t.new_zeros(1)]))
