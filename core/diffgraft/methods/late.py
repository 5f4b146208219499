"""Late starts: as many steps as a call asks for, spread from a level M below the noisiest on instead of from the top.

    def schedule(self, call, next):
        own = next(call)
        return late(call, own, kind_of(self.name, call.family, call.scheduler), 0.9, "start")

:mod:`diffgraft.methods.starts` keeps the end of a schedule instead, and puts clean latents there.
"""

from __future__ import annotations

from typing import Any, Literal

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
        ConfigError: fewer training steps are left than are asked for.
    """
    if kind == "flow":
        assert own.sigmas is not None  # of a flow scheduler
        sigmas = late_levels(own.sigmas, share)
        times = sigmas[: len(own.timesteps)] * call.scheduler.config.num_train_timesteps
        return Schedule(times.to(own.timesteps.dtype).to(own.timesteps.device), sigmas)
    steps = call.get("num_inference_steps")
    twin = shorter(call.scheduler, kind, share, **settings)
    if steps is not None and steps > twin.config.num_train_timesteps:
        raise ConfigError(
            f"plugin {call.entry.name!r}: {knob} = {share:g}: {twin.config.num_train_timesteps} training steps are left, fewer than the "
            f"{steps} that are asked for; begin earlier, or take fewer steps"
        )
    twin.set_timesteps(**call.arguments())
    return Schedule(twin.timesteps, getattr(twin, "sigmas", None))


def late_levels(sigmas: Tensor, share: float) -> Tensor:
    """A flow's levels, from ``share`` on instead of 1: M sigma, after whatever shift they have."""
    return share * sigmas


def shorter(scheduler: Any, kind: Kind, share: float, **settings: Any) -> Any:
    """A scheduler of the same class and settings, of a process that ends at M: its own way of spacing steps is then right."""
    config = scheduler.config
    if kind == "levels":
        return type(scheduler).from_config(config, sigma_max=share * config["sigma_max"])
    M = max(round(share * config["num_train_timesteps"]), 1)
    settings |= {"num_train_timesteps": M, "trained_betas": scheduler.betas[:M].tolist(), "rescale_betas_zero_snr": False}
    twin = type(scheduler).from_config(config, **{key: value for key, value in settings.items() if key in config})
    twin.alphas_cumprod = scheduler.alphas_cumprod[:M]  # as the training had them, also where betas were rescaled (CogVideoX, zero SNR)
    return twin
