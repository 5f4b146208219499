"""From time steps to what a scheduler runs on: its timesteps and the noise levels (sigmas) that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffgraft import ConfigError, Family, Schedule, Unsupported
from diffgraft.methods.predictions import is_flow
from torch import Tensor


def points(scheduler: Any, family: Family) -> range:
    """The time steps that may be drawn."""
    N = int(scheduler.config.num_train_timesteps)
    return range(1, N + 1) if is_flow(family, scheduler) else range(N)


def ensure_supported(scheduler: Any, family: Family) -> None:
    """Raises Unsupported where steps cannot be placed freely, or evaluate the denoiser more than once."""
    name, why = type(scheduler).__name__, None
    has_sigmas = getattr(scheduler, "sigmas", None) is not None
    if getattr(scheduler, "order", 1) != 1 or hasattr(scheduler, "plms_timesteps") or hasattr(scheduler, "order_list"):
        why = "its steps are not one denoiser call each (second order, single-step or Runge-Kutta warm-up)"
    elif scheduler.config.get("timestep_type") == "continuous":
        why = "timestep_type='continuous' gives the denoiser log(sigma)/4 instead of a training timestep"
    elif has_sigmas and not is_flow(family, scheduler) and getattr(scheduler, "alphas_cumprod", None) is None:
        why = "it has sigmas but no alphas_cumprod, so the noise level of a time step is not known"
    if why:
        raise Unsupported(f"autodiffusion: {name}: {why}; use DDIM, Euler, DPM++ 2M, UniPC or FlowMatchEuler")


def ensure_in_range(timesteps: Sequence[float], scheduler: Any, family: Family) -> None:
    """Raises ConfigError for a time step that the model was not trained at (a flow model is not run at 0, but may end there)."""
    last = points(scheduler, family)[-1]
    outside = [t for t in timesteps if not 0 <= t <= last or (t == 0 and is_flow(family, scheduler))]
    if outside:
        raise ConfigError(f"plugin 'autodiffusion': timesteps = {list(timesteps)}: {outside} outside the model's 0 to {last}")


def scheduled(timesteps: Sequence[float], end: float | None, made: Schedule, scheduler: Any, family: Family) -> Schedule:
    """The schedule of these time steps; what the scheduler has ``made`` itself where that is the same.

    Raises:
        Unsupported: an ``end``, or a time step between two training timesteps, under a scheduler that knows neither.
    """
    whole = all(t == int(t) for t in timesteps)
    if end is None and made.timesteps.tolist() == list(timesteps):
        return made
    t = torch.tensor(timesteps, dtype=made.timesteps.dtype if whole else torch.float32, device=made.timesteps.device)
    if made.sigmas is None:
        if end is not None or not whole:
            raise Unsupported(
                f"autodiffusion: {type(scheduler).__name__} moves between whole training timesteps and to the clean sample; timesteps = "
                f"{list(timesteps)} with end = {end} need a scheduler with sigmas (DPM++ 2M, Euler, UniPC)"
            )
        return Schedule(t, None)
    levels = sigmas_at([*timesteps, *(() if end is None else (end,))], scheduler, family).to(made.sigmas.device, made.sigmas.dtype)
    tail = made.sigmas[len(made.timesteps) :] if end is None else made.sigmas[:0]
    return Schedule(t, torch.cat([levels, tail]))


def sigmas_at(timesteps: Sequence[float], scheduler: Any, family: Family) -> Tensor:
    """The noise-to-signal ratio at time steps [n], float32, by the interpolation that diffusers' schedulers use; t / N for flow models."""
    if is_flow(family, scheduler):
        return torch.tensor(timesteps, dtype=torch.float64).div(scheduler.config.num_train_timesteps).float()
    abar = scheduler.alphas_cumprod.cpu()
    table = np.array(((1 - abar) / abar) ** 0.5)
    return torch.from_numpy(np.interp(np.array(timesteps), np.arange(len(table)), table).astype(np.float32))
