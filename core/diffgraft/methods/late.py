"""Late starts: as many steps as a call asks for, spread from a level M below the noisiest on instead of from the top.

    def schedule(self, call, next):
        own = next(call)
        return late(call, own, kind_of(self.name, call.family, call.scheduler), 0.9, "start")

:mod:`diffgraft.methods.starts` keeps the end of a schedule instead, and puts clean latents there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import Schedule, ScheduleCall
from diffgraft.methods.predictions import is_flow
from diffgraft.methods.starts import follows

SPREAD = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings by which a scheduler spreads its levels between ``sigma_min`` and ``sigma_max``, where its config names these."""
Kind = Literal["times", "flow", "levels"]


def kind_of(name: str, family: Family, scheduler: Any) -> Kind:
    """What M is a share of: the training's times, a flow's noise level, or the largest level that the config names.

    Args:
        name: the plugin's, for the refusal.

    Raises:
        Unsupported: the scheduler says none of them, or follows no other schedule than its own.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if not follows(scheduler):
        raise Unsupported(
            f"{name}: {kind} follows no schedule but its own, so a run cannot begin late: use DDIM, DPM++, UniPC or Euler, or leave the "
            "start where it is (1)"
        )
    if is_flow(family, scheduler):
        if config.get("invert_sigmas"):
            raise Unsupported(f"{name}: {kind} with invert_sigmas counts its levels upwards: it has no late start")
        return "flow"
    if config.get("sigma_max") is not None and any(config.get(key) for key in SPREAD):
        return "levels"
    if lacks := [key for key in ("alphas_cumprod", "betas") if getattr(scheduler, key, None) is None]:
        raise Unsupported(f"{name}: {kind} has no {lacks[0]}, so its process cannot be made to end at M: use DDIM, DPM++ or Euler")
    return "times"


def late(call: ScheduleCall, own: Schedule, kind: Kind, share: float, knob: str, **settings: Any) -> Schedule:
    """The schedule that begins at M.

    Args:
        own: the scheduler's own, with as many steps.
        share: M as a share of what ``kind`` counts, above 0 and at most 1.
        knob: the plugin's that says it, for the refusal.
        settings: other entries of the scheduler's config for this schedule (``timestep_spacing``), where it has them.

    Raises:
        ConfigError: fewer steps are left than are asked for (see :func:`ensure_steps`, which says it before a run begins).
    """
    if kind == "flow":
        assert own.sigmas is not None  # of a flow scheduler
        sigmas = late_levels(own.sigmas, share)
        times = sigmas[: len(own.timesteps)] * call.scheduler.config.num_train_timesteps
        return Schedule(times.to(own.timesteps.dtype).to(own.timesteps.device), sigmas)
    steps, count = call.get("num_inference_steps"), call.get("original_inference_steps")
    ensure_steps(call.entry.name, call.scheduler, kind, share, steps, knob, count)
    if steps is not None and grid_of(call.scheduler):
        return Schedule(own.timesteps.new_tensor(spread(left(call.scheduler, share, count), steps)), None)
    twin = shorter(call.scheduler, kind, share, **settings)
    twin.set_timesteps(**call.arguments())
    made = Schedule(twin.timesteps, getattr(twin, "sigmas", None))
    return to_the_end(made) if kind == "times" else made


def ensure_steps(name: str, scheduler: Any, kind: Kind, share: float, steps: Any, knob: str, count: int | None = None) -> None:
    """Refuse more steps than a late start leaves. It rests on nothing but settings, so a plugin's ``run`` can say it first.

    Args:
        name: the plugin's; ``knob``: that of its knobs which says ``share``.
        count: see :func:`grid_of`.

    Raises:
        ConfigError: with a share that leaves as many.
    """
    if kind != "times" or not isinstance(steps, int):
        return
    T, grid = int(scheduler.config["num_train_timesteps"]), grid_of(scheduler, count)
    there = len(left(scheduler, share, count)) if grid else last_of(share, T) + 1
    if steps <= there:
        return
    least = grid[-(steps - 1)] + 2 if 1 < steps <= len(grid) else steps  # t above steps - 1 times of the grid
    most = len(grid) if grid else T
    way = f"take {knob} = {least / T:g} or more, or fewer steps" if steps <= most else f"take {most} steps at most"
    raise ConfigError(
        f"plugin {name!r}: {knob} = {share:g}: {there} training steps are left"
        + (f" of the {len(grid)} that {type(scheduler).__name__} goes by" if grid else "")
        + f", fewer than the {steps} that are asked for; {way}"
    )


def last_of(share: float, T: int) -> int:
    """The noisiest time of a process of M = ``share`` T times: M - 1."""
    return max(round(share * T), 1) - 1


def grid_of(scheduler: Any, count: int | None = None) -> list[int]:
    """The times, falling, that a consistency model's scheduler (LCM, TCD) takes its steps from; of other schedulers none.

    Args:
        count: how many, where the call says it (``original_inference_steps``); None: as the config does.
    """
    usual, T = scheduler.config.get("original_inference_steps"), int(scheduler.config.get("num_train_timesteps", 1000))
    if usual is None or not (n := count or usual):
        return []
    return [T // n * i - 1 for i in range(n, 0, -1)]


def left(scheduler: Any, share: float, count: int | None = None) -> list[int]:
    """The times of :func:`grid_of` below the one at which a late run begins, and that one first: it is on the grid or not."""
    t = last_of(share, int(scheduler.config["num_train_timesteps"]))
    return [t, *(time for time in grid_of(scheduler, count) if time < t)]


def spread(times: Sequence[int], steps: int) -> list[int]:
    """``steps`` of them at even places, the first among them, as LCM and TCD take theirs."""
    return [times[i * len(times) // steps] for i in range(steps)]


def to_the_end(made: Schedule) -> Schedule:
    """Without times below 0: with trailing steps and an M / n that no float is equal to (600 / 7), diffusers makes one step too many, at
    t = -1."""
    keep = made.timesteps >= 0
    if made.sigmas is None:
        return Schedule(made.timesteps[keep], None)
    n = len(keep)
    return Schedule(made.timesteps[keep], torch.cat([made.sigmas[:n][keep.to(made.sigmas.device)], made.sigmas[n:]]))


def late_levels(sigmas: Tensor, share: float) -> Tensor:
    """A flow's levels, from ``share`` on instead of 1: M sigma, after whatever shift they have."""
    return share * sigmas


def shorter(scheduler: Any, kind: Kind, share: float, **settings: Any) -> Any:
    """A scheduler of the same class and settings, of a process that ends at M: its own way of spacing steps is then right."""
    config = scheduler.config
    if kind == "levels":
        return type(scheduler).from_config(config, sigma_max=share * config["sigma_max"])
    M = last_of(share, config["num_train_timesteps"]) + 1
    settings |= {"num_train_timesteps": M, "trained_betas": scheduler.betas[:M].tolist(), "rescale_betas_zero_snr": False}
    twin = type(scheduler).from_config(config, **{key: value for key, value in settings.items() if key in config})
    twin.alphas_cumprod = scheduler.alphas_cumprod[:M]  # as the training had them, also where betas were rescaled (CogVideoX, zero SNR)
    return twin
