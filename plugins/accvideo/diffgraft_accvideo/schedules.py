"""The levels of N of K steps, as a flow's scheduler shifts them."""

from __future__ import annotations

from typing import Any

import torch
from diffgraft import ConfigError, Family, Schedule, Unsupported
from diffgraft.methods.predictions import is_flow
from diffusers import FlowMatchEulerDiscreteScheduler

from diffgraft_accvideo.knobs import AccVideoConfig
from diffgraft_accvideo.method import key_points, linear

SPREAD = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "stochastic_sampling")
"""Settings under which the levels are not a shifted line, or a step is not Euler's."""


def ensure_flow(family: Family, scheduler: Any, knobs: AccVideoConfig) -> None:
    """Refuse a scheduler whose levels are no shifted line, that draws noise in its steps, or that takes no ``shift`` where one is said.

    Raises:
        Unsupported: with what to use instead.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if not is_flow(family, scheduler) or not (is_euler(scheduler) or config.get("use_flow_sigmas")):
        raise Unsupported(
            f"accvideo: {name} does not step along the shifted line of a flow model: use FlowMatchEulerDiscreteScheduler, or UniPC or "
            "DPM++ with use_flow_sigmas"
        )
    if wrong := [key for key in SPREAD if config.get(key)]:
        raise Unsupported(f"accvideo: {name} with {wrong[0]} has other levels than a student was made for: set {wrong[0]} = False")
    if str(kind := config.get("algorithm_type")).startswith("sde"):
        raise Unsupported(
            f"accvideo: {name} with algorithm_type = {kind!r} draws noise in each step, and a student's jumps have none: set "
            f"algorithm_type = {kind.removeprefix('sde-')!r}"
        )
    if config.get("final_sigmas_type") == "sigma_min":
        raise Unsupported(
            f"accvideo: {name} with final_sigmas_type = 'sigma_min' stops before the last jump: set final_sigmas_type = 'zero'"
        )
    if knobs.shift is not None and config.get("use_dynamic_shifting"):
        raise Unsupported(
            f"accvideo: shift = {knobs.shift:g}, and this {name} shifts by the size of the video (use_dynamic_shifting), so that a number "
            "does nothing: leave shift out, or set use_dynamic_shifting = False"
        )


def is_euler(scheduler: Any) -> bool:
    """Whether its steps are the jumps that a student learns."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def whole(scheduler: Any, K: int, knobs: AccVideoConfig, device: Any = None, mu: float | None = None) -> Schedule:
    """The scheduler's own K steps from the line 1..1/K, which FlowMatchEuler does not take when it is told the number alone.

    Args:
        mu: what the pipeline says of the size, where the shift is dynamic.

    Raises:
        Unsupported: it makes no K steps (one that another plugin brings may know fewer), or ends above the last level of its training.
    """
    shift, euler = knobs.shift, is_euler(scheduler)
    twin = type(scheduler).from_config(scheduler.config, **({} if shift is None else {"shift" if euler else "flow_shift": shift}))
    if euler and shift is None and not scheduler.config.get("use_dynamic_shifting"):
        twin.set_shift(scheduler.shift)  # as `set_shift` may have left it
    given = {} if mu is None else {"mu": mu}
    try:
        if euler and knobs.levels == "line":
            twin.set_timesteps(sigmas=linear(K).tolist(), device=device, **given)
        else:
            twin.set_timesteps(K, device=device, **given)
    except ValueError as error:
        name = type(scheduler).__name__
        raise Unsupported(f"accvideo: {name} does not make the grid of {K} steps that a student's levels are of: {error}") from error
    if not euler and (last := float(twin.sigmas[-1])) * scheduler.config.num_train_timesteps > 1.001:
        raise Unsupported(
            f"accvideo: {type(scheduler).__name__} ends at the level {last:.4g}, before a student's last jump, which ends at 0: use "
            "FlowMatchEulerDiscreteScheduler, or UniPC or DPM++ with use_flow_sigmas"
        )
    return Schedule(twin.timesteps, twin.sigmas)


def strided(made: Schedule, N: int) -> Schedule:
    """The levels of N of its steps (see :func:`~diffgraft_accvideo.method.key_points`)."""
    K = len(made.timesteps)
    if not 1 <= N <= K:
        raise ConfigError(f"plugin 'accvideo': {N} steps of a grid of {K}: at most as many; call with fewer, or raise grid")
    index = torch.tensor(key_points(K, N), device=made.timesteps.device)
    assert made.sigmas is not None  # of a flow scheduler
    return Schedule(made.timesteps[index[:-1]], made.sigmas[index.to(made.sigmas.device)])
