"""Where a run begins: at a level in the middle of the schedule, from latents that a plugin made.

    def schedule(self, call, next):
        return cut(call, next(call), self.config.start)

    def denoise(self, call, next):
        if call.step.call == 0:
            call = call.with_latents(start_from(call, z0))
        return next(call)

The pipeline's own preparation of latents is not touched, so this is the same for every family. The noise is the one that the pipeline
drew, from the user's generators; only its scale is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffgraft.installed.errors import ConfigError, Conflict, Unsupported
from diffgraft.kernel.calls import DenoiseCall, Schedule, ScheduleCall
from diffgraft.kernel.facts import pace_of
from diffgraft.kernel.slots import follows as follows
from diffgraft.methods.predictions import SignalNoise, levels_of


def cut(call: ScheduleCall, schedule: Schedule, level: float) -> Schedule:
    """The end of a schedule: from the first step whose timestep is ``level`` or the next below it.

    It is cut where a step of the solver begins (second-order ones name a level twice), as diffusers' image-to-image pipelines cut it.

    Args:
        level: a timestep in the scheduler's own numbers, above 0 and at most ``num_train_timesteps``.

    Raises:
        ConfigError: no step begins there.
    """
    scheduler = call.scheduler
    most = int(scheduler.config.get("num_train_timesteps", 1000))
    times = schedule.timesteps.tolist()  # once a run
    begin = begins_at(scheduler, times, level)
    if begin is None or not 0 < level <= most:
        raise ConfigError(
            f"{call.entry.name}: no step of this run begins at timestep {level:g}: its {len(times)} timesteps go from {times[0]:g} to "
            f"{times[-1]:g}, of {most} that the model was trained with; take a level between them, or more steps"
        )
    return Schedule(schedule.timesteps[begin:], None if schedule.sigmas is None else schedule.sigmas[begin:])


def begins_at(scheduler: Any, times: Sequence[float], level: float) -> int | None:
    """Where in a schedule's timesteps the first step of the solver begins that is not above ``level``; None: nowhere. See :func:`cut`."""
    return next((i for i in range(0, len(times), pace_of(scheduler).later) if times[i] <= level), None)


def is_first(call: DenoiseCall) -> bool:
    """Whether this is the first denoiser call of its step: with guidance in one call a branch, further ones follow."""
    return not call.guided or call.branches[0] == call.family.guidance.order[0]


def unit_noise(call: DenoiseCall) -> Tensor:
    """The standard normal noise [batch, ...] that the pipeline drew (or was given as ``latents``), without the scheduler's scale; float32.

    Raises:
        Unsupported: this is not the first denoiser call of a run from noise.
        Conflict: a plugin further out has put other latents in.
    """
    name = call.entry.name
    if call.step.begin:
        raise Unsupported(
            f"{name} sets where a run begins, but this one begins in the middle of its schedule: call the pipeline without a picture"
        )
    if call.step.call or not is_first(call):
        raise Unsupported(f"{name}: the noise of a run is seen in its first denoiser call alone; keep it in call.shared")
    if call.run.carried is not None:
        raise Conflict(f"{name} sets where a run begins, but another plugin, further out, has done so already; keep one")
    return call.latents.float() / (1.0 if call.family.unit_start else getattr(call.pipe.scheduler, "init_noise_sigma", 1.0))


def at_level(z0: Tensor, noise: Tensor, levels: SignalNoise) -> Tensor:
    """a z0 + s n, float32: clean latents with so much noise on them (q(x_t | x_0))."""
    return levels.a * z0.float() + levels.s * noise.float()


def start_from(call: DenoiseCall, z0: Tensor, noise: Tensor | None = None) -> Tensor:
    """Latents to begin with instead of the pipeline's: ``z0`` noised to the level of the run's first step, in the pipeline's dtype.

    To be put into every denoiser call of the first step: the other branch's gets the same.

    Args:
        z0: clean latents [batch or 1, ...] in the layout of ``scheduler.step``.
        noise: like the latents; by default the one that the pipeline drew.

    Raises:
        Unsupported, Conflict: see :func:`unit_noise`.
    """
    if call.step.call == 0 and not is_first(call):
        return call.latents
    drawn = unit_noise(call)
    return at_level(z0, drawn if noise is None else noise, levels_of(call)).to(call.latents.dtype)
