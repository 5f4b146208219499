"""The noise levels of a scheduler's schedule."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

from diffgraft import ScheduleCall, Unsupported
from torch import Tensor

TIMES = 1000


def levels_of(scheduler: Any, timesteps: Tensor, sigmas: Tensor | None) -> list[float]:
    """Levels where the steps of a scheduler's schedule begin, each once, and 0: of Euler's its sigmas, of others what the denoiser is told
    (their sigmas are up to a timestep above it).

    Raises:
        Unsupported: these are no levels of a flow.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and sigmas is not None:
        return [float(level) for level in sigmas]
    times = timesteps.double().cpu()
    times = times.unique_consecutive() if getattr(scheduler, "order", 1) > 1 else times  # of two stages a step
    levels = [*(times / scheduler.config.get("num_train_timesteps", TIMES)).tolist(), 0.0]
    if levels[0] > 1 or any(b >= a for a, b in pairwise(levels)):
        shown = ", ".join(f"{level:.4g}" for level in levels[:8])
        raise Unsupported(f"phased_dmd: the levels of {type(scheduler).__name__} do not fall from 1 to 0: {shown}; give shift, or sigmas")
    return levels


def levels_by(scheduler: Any, call: ScheduleCall, steps: int) -> list[float]:
    """:func:`levels_of` what a scheduler would make of the pipeline's call; it stays as it is."""
    mine, takes = type(scheduler).from_config(scheduler.config), inspect.signature(scheduler.set_timesteps).parameters
    if hasattr(scheduler, "set_shift") and not scheduler.config.get("use_dynamic_shifting"):
        mine.set_shift(scheduler.shift)  # as `set_shift` may have left it
    given = {name: call.get(name) for name in ("device", "mu") if name in takes and call.get(name) is not None}
    if type(scheduler).__name__.startswith("FlowMatch") and "sigmas" in takes and call.get("sigmas") is not None:
        given["sigmas"] = call.get("sigmas")
    mine.set_timesteps(num_inference_steps=steps, **given)
    return levels_of(mine, mine.timesteps, getattr(mine, "sigmas", None))
