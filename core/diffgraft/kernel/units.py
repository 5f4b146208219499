"""A scheduler that takes the place of the pipeline's own for a run speaks the own one's language.

That is ``x0 + sigma eps`` where the own one is of Euler's kind (variance exploding), ``a x0 + s eps`` where it is of DDIM's. A plugin's
scheduler need not know: where the units differ, the run gets a twin of it that translates at its door.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import getattr_static
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.kernel.calls import Schedule, ScheduleCall
from diffgraft.kernel.slots import class_for_one, place_in

CUTS = ("denoising_start", "denoising_end")
"""Arguments by which a pipeline hands latents to another one in the middle of the schedule, at a share of the time."""
OWN = ("timesteps", "sigmas")
"""Arguments by which a user gives the schedule."""
LEAST = 2.0**-12
"""Signal level of a terminal SNR of 0, as diffusers' own schedulers have it."""
_EXPLODES = "_diffgraft_explodes"


def is_exploding(scheduler: Any) -> bool:
    """Whether latents are ``x0 + sigma eps``: such schedulers start from noise that is scaled up; a twin says it."""
    told: bool | None = getattr(type(scheduler), _EXPLODES, None)
    return float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0 if told is None else told


def begin_of(scheduler: Any, timestep: Any) -> int:
    """Where in the schedule a run begins (image-to-image cuts the front off), seen at its first timestep.

    ``begin_index`` says it where the scheduler has one. Else the first timestep that the pipeline uses is a view into
    ``scheduler.timesteps``, which says its place.
    """
    begin = getattr(scheduler, "begin_index", None)
    timesteps = scheduler.timesteps
    if begin is None and isinstance(timestep, Tensor) and isinstance(timesteps, Tensor):
        begin = place_in(timesteps, timestep)
    return begin or 0


@dataclass(frozen=True)
class Replaced:
    """The pipeline's ``own`` scheduler, and the ``new`` one of a plugin (``by``) that is in its place."""

    own: Any
    new: Any
    by: str

    def check(self, arguments: Mapping[str, Any], notes: list[str]) -> None:
        """Hold a call's arguments against the new scheduler, before anything runs.

        Raises:
            ConfigError: both ``timesteps`` and ``sigmas``.
            Unsupported: a schedule of the user's that ``new`` does not take.
        """
        new = self.new
        given = [name for name in OWN if arguments.get(name) is not None]
        if len(given) > 1:
            raise ConfigError("timesteps and sigmas were both given: give one")
        if given and given[0] not in inspect.signature(new.set_timesteps).parameters:
            raise Unsupported(
                f"{self.by}: {given[0]} = {arguments[given[0]]} was given, but {type(new).__name__}, which takes the place of "
                f"{type(self.own).__name__}, makes its own schedule: give num_inference_steps, or take {self.by} off"
            )
        if arguments.get("eta") and "eta" not in inspect.signature(new.step).parameters:
            text = f"eta = {arguments['eta']:g} is without effect: {type(new).__name__} draws no noise"
            notes += [] if text in notes else [text]

    def levels(self, call: ScheduleCall, made: Schedule) -> Schedule:
        """The schedule ``made`` by the new scheduler; in a run that is cut at a share of the time, the own scheduler's points: whoever
        made the latents that come in, or goes on from those that go out, takes them to be as noisy as they are there.
        """
        if not any(isinstance(call.run.arguments.get(name), float) for name in CUTS):
            return made
        if any(call.run.arguments.get(name) is not None for name in OWN):
            return made  # the user's
        own = copy.copy(self.own)
        own.set_timesteps(*call.args, **call.kwargs)
        t, sigmas = points(own)
        if torch.equal(t.double(), made.timesteps.cpu().double()):
            return made
        whole = made.timesteps.is_floating_point() or bool((t == t.round()).all())
        t = t.to(made.timesteps.device, made.timesteps.dtype if whole else t.dtype)
        if made.sigmas is None:
            return Schedule(t, None)
        end = made.sigmas[len(made.timesteps) :]
        return Schedule(t, torch.cat([sigmas.to(made.sigmas.device, made.sigmas.dtype), end]))


def points(scheduler: Any) -> tuple[Tensor, Tensor]:
    """(times, sigmas) [n] of a scheduler's schedule on the CPU, each level once: second-order ones name a level twice."""
    t: Tensor = scheduler.timesteps.cpu()
    if (sigmas := getattr(scheduler, "sigmas", None)) is None:
        abar = scheduler.alphas_cumprod.cpu().double()[t.long()]
        sigmas = (1 / abar - 1).sqrt()
    sigmas = sigmas[: len(t)].cpu()
    last = torch.cat([sigmas[1:] != sigmas[:-1], torch.ones(1, dtype=torch.bool)])
    return t[last], sigmas[last]


def signal_levels(scheduler: Any) -> list[float]:
    """a of the variance-preserving samples at each point of a schedule [n + 1].

    Raises:
        Unsupported: the scheduler does not say how noisy its samples are.
    """
    if (sigmas := getattr(scheduler, "sigmas", None)) is not None:
        a = (1 + sigmas.double().cpu().square()).rsqrt()
    elif (abar := getattr(scheduler, "alphas_cumprod", None)) is not None:
        abar = abar.double().cpu()
        end = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", abar[0])).double()
        a = torch.cat([abar[scheduler.timesteps.cpu().long()], end.view(1)]).sqrt()
    else:
        name = type(scheduler).__name__
        raise Unsupported(f"{name} has neither sigmas nor alphas_cumprod, so its latents cannot be brought to the pipeline's own unit")
    return a.clamp(min=LEAST).tolist()  # type: ignore[no-any-return]


def in_place_of(own: Any, new: Any) -> Any:
    """``new``, or a twin of it whose latents are in the unit of ``own``."""
    if is_exploding(own) == is_exploding(new):
        return new
    twin: Any = object.__new__(class_for_one(type(new), _door(type(new), is_exploding(own))))
    twin.__dict__.update(new.__dict__)
    return twin


class Door:
    """Where a translating scheduler is in its run, and what it handed out last, in the solver's own unit."""

    def __init__(self) -> None:
        self.index: int | None = None
        self.outside: list[float] = []
        self.kept: Tensor | None = None


def _door(base: Any, explodes: bool) -> dict[str, Any]:
    """Methods that translate between the solver's unit and the one outside: latents outside = factor x the solver's."""
    door = Door()

    def factors(self: Any) -> list[float]:
        a = signal_levels(self)
        return [1 / each for each in a] if explodes else a

    def here(self: Any, timestep: Any) -> int:
        if door.index is None:
            door.index, door.outside = begin_of(self, timestep), factors(self)
        return min(door.index, len(door.outside) - 1)

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        base.set_timesteps(self, *args, **kwargs)
        door.index = door.kept = None
        factors(self)  # refuses now what could not be translated later

    def init_noise_sigma(self: Any) -> float:
        sigma: Any = getattr_static(base, "init_noise_sigma", 1.0)
        sigma = sigma.__get__(self) if isinstance(sigma, property) else self.__dict__.get("init_noise_sigma", sigma)
        a = signal_levels(self)
        rises = a[0] >= a[-1]  # a walk upwards begins with latents, not with noise that has no unit yet
        return 1.0 if rises else float(sigma) * (1 / a[0] if explodes else a[0])

    @functools.wraps(base.scale_model_input)
    def scale_model_input(self: Any, sample: Tensor, timestep: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        i = here(self, timestep)
        return base.scale_model_input(self, sample / door.outside[i], timestep, *args, **kwargs)  # type: ignore[no-any-return]

    @functools.wraps(base.step)
    def step(self: Any, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        i = here(self, timestep)
        x, kept = sample / door.outside[i], door.kept
        if kept is not None and kept.shape == sample.shape:  # what nobody edited is not rounded twice
            x = torch.where(sample == kept * door.outside[i], kept, x)
        raw = base.step(self, model_output, timestep, x, *args, **kwargs)
        plain = isinstance(raw, tuple)
        door.kept, door.index = raw[0] if plain else raw.prev_sample, i + 1
        out = door.kept * door.outside[min(i + 1, len(door.outside) - 1)]
        return (out, *raw[1:]) if plain else type(raw)(**{**raw, "prev_sample": out})

    @functools.wraps(base.add_noise)
    def add_noise(self: Any, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        one = torch.ones(timesteps.numel(), *[1] * (original_samples.ndim - 1), device=original_samples.device)
        x: Tensor = base.add_noise(self, original_samples, noise, timesteps)
        a = base.add_noise(self, one, one * 0, timesteps)
        level = 1 / a if explodes else (a.square() + base.add_noise(self, one * 0, one, timesteps).square()).rsqrt()
        return (x * level).to(x.dtype)

    names = {"set_timesteps": set_timesteps, "scale_model_input": scale_model_input, "step": step, "add_noise": add_noise}
    return {**names, "init_noise_sigma": property(init_noise_sigma), _EXPLODES: explodes}
