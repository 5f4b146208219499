"""The same number of steps, from M instead of T on."""

from __future__ import annotations

from typing import Any, Literal

from diffgraft import ConfigError, Family, Schedule, ScheduleCall, Unsupported
from diffgraft.methods.predictions import is_flow
from diffgraft.methods.starts import follows

from diffgraft_cil_start.method import late_levels

AUTHORS = {"times": 0.94, "flow": 0.94, "levels": 1 / 7}
"""M / T in the official settings: 940 of 1000 (DynamiCrafter, VideoCrafter), sigma 100 of 700 (SVD); flow models by formula."""
SPREAD = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
"""Settings by which a scheduler spreads its levels between ``sigma_min`` and ``sigma_max``, where its config names these."""
Kind = Literal["times", "flow", "levels"]


def kind_of(family: Family, scheduler: Any) -> Kind:
    """What M is a share of: the training's times, a flow's noise level, or the largest level that the config names.

    Raises:
        Unsupported: the scheduler says none of them, or follows no other schedule than its own.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if not follows(scheduler):
        raise Unsupported(
            f"cil_start: {name} follows no schedule but its own, so it cannot begin late: use DDIM, DPM++, UniPC or Euler, or start = 1"
        )
    if is_flow(family, scheduler):
        if config.get("invert_sigmas"):
            raise Unsupported(f"cil_start: {name} with invert_sigmas counts its levels upwards: it has no late start")
        return "flow"
    if config.get("sigma_max") is not None and any(config.get(key) for key in SPREAD):
        return "levels"
    if lacks := [key for key in ("alphas_cumprod", "betas") if getattr(scheduler, key, None) is None]:
        raise Unsupported(f"cil_start: {name} has no {lacks[0]}, so its process cannot be made to end at M: use DDIM, DPM++ or Euler")
    return "times"


def share_of(start: float | None, kind: Kind) -> float:
    """M / T."""
    return AUTHORS[kind] if start is None else start


def late(call: ScheduleCall, own: Schedule, kind: Kind, share: float) -> Schedule:
    """The schedule that begins at M.

    Raises:
        ConfigError: fewer training steps are left than are asked for.
    """
    if kind == "flow":
        assert own.sigmas is not None  # of a flow scheduler
        sigmas = late_levels(own.sigmas, share)
        times = sigmas[: len(own.timesteps)] * call.scheduler.config.num_train_timesteps
        return Schedule(times.to(own.timesteps.dtype).to(own.timesteps.device), sigmas)
    steps = call.get("num_inference_steps")
    twin = shorter(call.scheduler, kind, share)
    if steps is not None and steps > twin.config.num_train_timesteps:
        raise ConfigError(
            f"plugin 'cil_start': start = {share:g}: {twin.config.num_train_timesteps} training steps are left, fewer than the {steps} "
            "that are asked for; begin earlier, or take fewer steps"
        )
    twin.set_timesteps(**call.arguments())
    return Schedule(twin.timesteps, getattr(twin, "sigmas", None))


def shorter(scheduler: Any, kind: Kind, share: float) -> Any:
    """A scheduler of the same class and settings, of a process that ends at M: its own way of spacing steps is then right."""
    config = scheduler.config
    if kind == "levels":
        return type(scheduler).from_config(config, sigma_max=share * config["sigma_max"])
    M = max(round(share * config["num_train_timesteps"]), 1)
    settings = {"num_train_timesteps": M, "trained_betas": scheduler.betas[:M].tolist(), "rescale_betas_zero_snr": False}
    twin = type(scheduler).from_config(config, **{key: value for key, value in settings.items() if key in config})
    twin.alphas_cumprod = scheduler.alphas_cumprod[:M]  # as the training had them, also where betas were rescaled (CogVideoX, zero SNR)
    return twin
