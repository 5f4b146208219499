"""Where a run is, as plain facts, and what fits certain runs only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """Where a run is: in steps of the solver, which papers and knobs count, and in ``scheduler.step`` calls, of which a step may take more.

    index   which of the solver's steps this is, from 0: what a plan is made of (key steps, shares, schedules)
    total   how many of them the run makes (image-to-image makes only the tail of the schedule)
    t       the scheduler's timestep, a 0-dim tensor (reading its value would wait for the GPU)
    sigma   the scheduler's sigma at this call, a 0-dim tensor, or None where the scheduler has none
    begin   steps of the schedule before the first that is run: this one is number ``begin + index`` of the schedule
    call    count of ``scheduler.step`` calls since ``set_timesteps``: never looked up from a timestep's value
    calls   how many there will be: as many as steps, but Heun and KDPM2 take two a step, PLMS two for its first one
    stage   which of its step's calls this is, from 0
    stages  how many calls this step takes
    behind  calls of the schedule that come after this one, whether the run makes them or not
    """

    index: int
    total: int
    t: Tensor
    sigma: Tensor | None
    begin: int = 0
    call: int = 0
    calls: int = 1
    stage: int = 0
    stages: int = 1
    behind: int = 0

    @property
    def is_last(self) -> bool:
        """Whether this is the last ``scheduler.step`` call of the run."""
        return self.call == self.calls - 1

    @property
    def ends_schedule(self) -> bool:
        """Whether this is the schedule's last call, to the clean sample; a run that ends before (``denoising_end``) gives noisy latents."""
        return self.behind == 0

    @property
    def ends_step(self) -> bool:
        """Whether the solver's step is done with this call."""
        return self.stage == self.stages - 1


@dataclass(frozen=True)
class Pace:
    """How many ``scheduler.step`` calls the solver's steps take: the first ``steps`` of them ``first`` each, the others ``later``."""

    first: int = 1
    steps: int = 0
    later: int = 1

    def step_of(self, call: int) -> int:
        """The step that a call belongs to."""
        head = self.first * self.steps
        return call // self.first if call < head else self.steps + (call - head) // self.later

    def call_of(self, step: int) -> int:
        """The call that a step begins with."""
        return self.first * step if step < self.steps else self.first * self.steps + self.later * (step - self.steps)

    def is_start(self, call: int) -> bool:
        """Whether a step begins with this call."""
        return self.call_of(self.step_of(call)) == call

    def steps_in(self, calls: int) -> int:
        """How many steps so many calls are, from the first on; the last may be short of calls."""
        return self.step_of(calls - 1) + 1 if calls > 0 else 0


def pace_of(scheduler: Any) -> Pace:
    """The pace of a scheduler as it is set now.

    Most schedulers name it (``order``). Pseudo linear multistep (PLMS) makes its first step twice, once as a guess; a Runge-Kutta
    beginning (PRK) takes four calls a step.
    """
    if not hasattr(scheduler, "prk_timesteps"):
        return Pace(later=max(int(getattr(scheduler, "order", 1)), 1))
    return Pace(first=2, steps=1) if scheduler.config.skip_prk_steps else Pace(first=4, steps=3)


@dataclass
class ScheduledCopy:
    """A copy of the scheduler that the pipeline has made in a run, which steps at times of its own."""

    scheduler: Any
    number: int
    stepped: int = 0

    def place(self, step: Step) -> Step:
        """``step`` of the run, where this copy is in its schedule."""
        timesteps, sigmas = self.scheduler.timesteps, getattr(self.scheduler, "sigmas", None)
        at = min((getattr(self.scheduler, "begin_index", None) or 0) + self.stepped, len(timesteps) - 1)
        sigma = sigmas[at] if isinstance(sigmas, Tensor) and at < len(sigmas) else None
        return replace(step, t=timesteps[at], sigma=sigma, behind=len(timesteps) - 1 - at)


@runtime_checkable
class RunBound(Protocol):
    """A thing that a plugin was given and that fits certain runs only: an artefact, what a search found."""

    def ensure_run(self, scheduler: Any, steps: int, shape: tuple[int, ...], fits: Collection[str], guidance: float | None) -> None:
        """Raises ArtefactMismatch when one of these is another than it was made for, as far as ``fits`` names it."""
