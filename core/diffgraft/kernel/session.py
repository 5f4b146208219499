"""A session: the denoiser with a stack's plugins, without the pipeline's loop. For training, scores and distillation.

    with pipe.plugins.session({"guidance_scale": 7.5}, scheduler=scheduler) as session:
        session.at(3)
        prediction = session.model(x, t, encoder_hidden_states=hidden, branch="cond", return_dict=False)[0]

The plugins' ``denoise``, ``block``, ``attention`` and ``control`` hooks act as in a run, with fresh state that is freed at the end. Their
``run``, ``schedule``, ``step`` and ``guide`` hooks have nothing to act on: a plugin that needs them for what it does in the denoiser is
refused (``Plugin.sessions``). Gradients flow where the caller has them on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from diffgraft.installed.errors import ConfigError, Unsupported, choices
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.facts import Step
from diffgraft.kernel.onion import running
from diffgraft.kernel.run import Run
from diffgraft.kernel.speech import ask
from diffgraft.stacks.report import Report


class SessionRun(Run):
    """A run in which the caller says what a loop would: the step, and which branch a denoiser call is."""

    named = "cond"
    """The name of the denoiser call that comes."""
    _given: Step | None = None

    def at(self, step: int | Step) -> None:
        """Go to a step."""
        self._begin_schedule()
        self._begin, self._given = 0, None
        if isinstance(step, Step):
            self._given = self._step = step
            return
        steps = self.pace.steps_in(len(self.pipe.scheduler.timesteps))
        if not 0 <= step < steps:
            raise ConfigError(f"step {step} of a session whose scheduler is set to {steps} steps: 0 to {steps - 1}")
        self.calls = self.pace.call_of(step)

    def planned_calls(self) -> int | None:
        return None

    def step_at(self, ahead: int) -> Step:
        return super().step_at(ahead) if self._given is None else self._given

    def guidance_active(self) -> bool:
        return self.named == self.family.guidance.together or (self.guidance_scale("") or 0) > 1

    def _said_scale(self, model_name: str) -> float | None:
        return self.arguments.get(self.family.guidance.scale)

    def _branch_of_call(self, rows: int) -> tuple[str, tuple[str, ...]]:
        guidance = self.family.guidance
        branches = guidance.usual if self.named == guidance.together else (self.named,)
        if rows % len(branches):
            raise ConfigError(f"branch={self.named!r} of {rows} rows: the batch holds an equal part for each of {', '.join(branches)}")
        return self.named, branches


class Session:
    """What ``pipe.plugins.session(...)`` gives, to be entered by ``with``."""

    def __init__(self, enter: Callable[[Session], SessionRun], leave: Callable[[], None]) -> None:
        self._enter, self._leave = enter, leave
        self._run: Any = None

    def __enter__(self) -> Session:
        self._run = self._enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    @property
    def report(self) -> Report:
        """What the plugins have done so far."""
        report: Report = self._run.report
        return report

    def at(self, step: int | Step) -> None:
        """Say where in a run the calls that follow are: the number of a step of the session's scheduler, or any :class:`Step` (a level
        that was drawn for training). What plugins keep stays.

        Raises:
            ConfigError: the scheduler has no such step.
        """
        self._run.at(step)

    def model(self, *args: Any, branch: str = "cond", denoiser: str | None = None, **kwargs: Any) -> Any:
        """One call of a denoiser, with the arguments that the pipeline would give it; returns what it returns.

        Args:
            branch: "cond", "uncond"..., or "both" ("cond+image+uncond" where there are three) for a batch with an equal part for each of
                the family's branches.
            denoiser: the attribute of the pipeline that holds it, where there are two.

        Raises:
            ConfigError: no such branch or denoiser.
        """
        run = self._run
        name, guidance = denoiser or run.family.denoisers[0], run.family.guidance
        names = (guidance.together, *guidance.order, *(name for name, _ in guidance.extra))
        if branch not in names:
            raise ConfigError(f"branch={branch!r}{choices(branch, names, 'Known')}")
        if name not in run.family.denoisers or getattr(run.pipe, name, None) is None:
            raise ConfigError(f"denoiser={name!r}{choices(name, run.family.denoisers, 'Known')}")
        run.named = branch
        with running(run):
            return getattr(run.pipe, name)(*args, **kwargs)

    def predict(self, arguments: Mapping[str, Any], branch: str = "cond", denoiser: str | None = None) -> Tensor:
        """The prediction of one call as plugins see it, for arguments as they see them (``Conditioning.whole``): whatever sign the
        denoiser gives it, whether or not it takes lists of samples. Otherwise like :meth:`model`."""
        return ask(self._run.family, partial(self.model, branch=branch, denoiser=denoiser), arguments)


def ensure_no_loop(entries: Sequence[Entry]) -> None:
    """Raises Unsupported where a plugin's work in the denoiser rests on hooks around the loop."""
    if bound := [entry.name for entry in entries if entry.plugin.needs_loop()]:
        raise Unsupported(
            f"{', '.join(bound)}: works around the pipeline's loop, which a session has not; pipe.plugins.disable({bound[0]!r}) first"
        )


def begin(pipe: Any, family: Any, entries: Any, arguments: Mapping[str, Any], check_finite: bool) -> SessionRun:
    """A session's run, at its first step."""
    run = SessionRun(pipe, family, entries, check_finite)
    run.begin_pass(arguments)
    run._begin = 0
    return run
