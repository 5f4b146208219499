"""Phased DMD (Fan et al., arXiv 2510.27684): a run of a few steps, by a distilled LoRA for each phase of the noise.

Steps from a level above t_1 are the first expert's, those down to t_2 the second's, and so on; guidance is off, because the experts were
distilled from a guided teacher. ``diffgraft fit phased_dmd`` learns them, phase after phase.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    ConfigError,
    DenoiseCall,
    Effects,
    Family,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
)
from diffgraft.methods.adapters import beside
from diffgraft.methods.distilled import ensure_own_levels, in_steps, unguided
from pydantic import Field, field_validator, model_validator
from torch import Tensor
from typing_extensions import Self

from diffgraft_phased_dmd.fitting import PhasedFitter
from diffgraft_phased_dmd.levels import levels_by
from diffgraft_phased_dmd.method import SHIFTS, evenly, phase_of, renoised, shifted

__all__ = ["PhasedDmd", "PhasedDmdConfig"]
__version__ = "0.1.0"

TIMES = 1000
PURE = 0.98
"""A table that begins lower is for another start than noise."""
PHASES = ("phase_1", "phase_2", "phase_3", "phase_4")


def expert(words: str) -> Any:
    """A knob for an expert."""
    return Field(
        None, description=f"LoRA of the {words}: a file, owner/name/file on the Hub, or by denoiser where there are two; none: off"
    )


class PhasedDmdConfig(PluginConfig):
    """Knobs of Phased DMD."""

    phase_1: Any = expert("first phase, from pure noise")
    phase_2: Any = expert("second phase, from t_1")
    phase_3: Any = expert("third phase, from t_2")
    phase_4: Any = expert("fourth phase, from t_3")
    boundaries: tuple[float, ...] = Field(
        (),
        max_length=3,
        description="t_1 > t_2 > ...: noise levels (sigma, 0 to 1) from which the next phase's expert acts; one fewer than experts",
    )
    steps: int | None = Field(
        4, ge=1, description="N: steps of a run, in a call that says none; one that says another number is refused. None: any number"
    )
    shift: Literal["wan2.2-lightning", "qwen-image-lightning"] | float | None = Field(
        None,
        description="of the levels u = 1, 1 - 1/N, ..., 1/N: s u / (1 + (s - 1) u); a number above 0, or a published model's; none: the "
        "pipeline's own",
    )
    sigmas: tuple[float, ...] | None = Field(
        None, min_length=1, description="where the steps begin, the whole table instead of steps and shift: from 1, falling, above 0"
    )
    sampler: Literal["euler", "renoise"] = Field(
        "euler", description="a step: of the flow's ODE; or to the estimate of x_0 and back to the next level with fresh noise"
    )
    guidance: Literal["off", "keep"] = Field(
        "off", description="off: a run has none, and a scale above 1 in the call is refused; keep: as the pipeline and the call have it"
    )
    strength: float = Field(1.0, gt=0, le=2, description="of the experts")

    @field_validator(*PHASES)
    @classmethod
    def _a_lora(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple, set, frozenset, int, float)) or value == "":
            raise ValueError(
                f"{value!r} is no LoRA: give one file, owner/name/file on the Hub, or a dict of them by denoiser; other phases have knobs "
                f"of their own ({', '.join(PHASES)})"
            )
        return value

    @field_validator("boundaries", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _together(self) -> Self:
        given = [name for name in PHASES if getattr(self, name) is not None]
        if missing := [name for name in PHASES[: len(given)] if name not in given]:
            raise ValueError(f"{', '.join(given)}, but {missing[0]} is missing: phases are numbered from the noisiest without a gap")
        if given and len(given) != len(self.boundaries) + 1:
            raise ValueError(
                f"boundaries = {self.boundaries} make {len(self.boundaries) + 1} phases, and the experts given are {', '.join(given)}: "
                "give one boundary fewer than experts"
            )
        for name in ("boundaries", "sigmas"):
            values = getattr(self, name) or ()
            if any(not 0 < value <= 1 for value in values) or any(b >= a for a, b in pairwise(values)):
                raise ValueError(f"{name} = {values}: noise levels above 0 and at most 1, each below the one before")
        if self.sigmas is not None:
            if self.sigmas[0] < PURE:
                raise ValueError(f"sigmas = {self.sigmas}: a run begins in pure noise, so the first is 1 (or at least {PURE})")
            if self.shift is not None:
                raise ValueError(f"sigmas = {self.sigmas} is the whole table, as a run has it: leave shift out, or sigmas")
            if "steps" in self.model_fields_set and self.steps != len(self.sigmas):
                raise ValueError(f"sigmas = {self.sigmas} is a table of {len(self.sigmas)} steps, steps = {self.steps}: leave steps out")
        if not isinstance(self.shift, str) and self.shift is not None and not 0 < self.shift <= 1000:
            raise ValueError(f"shift = {self.shift}: above 0, at most 1000 (levels above would be one level in float32)")
        return self

    @property
    def number(self) -> int | None:
        """Of steps; None: any."""
        return self.steps if self.sigmas is None else len(self.sigmas)


@dataclass
class Phased:
    """Of a run: the phase of each step of its schedule, and the levels where they begin and end."""

    phases: tuple[int, ...] = ()
    levels: tuple[float, ...] = ()

    def read(self, scheduler: Any, boundaries: Sequence[float]) -> None:
        """Of the scheduler's schedule, once all plugins have had it; not again before the next one."""
        if not self.levels:
            self.levels = tuple(scheduler.sigmas.tolist())
            self.phases = tuple(phase_of(level, boundaries) for level in self.levels[:-1])


class PhasedDmd(Plugin):
    name = "phased_dmd"
    paper = Paper(
        title="Phased DMD: Few-step Distribution Matching Distillation via Score Matching within Subintervals",
        arxiv="2510.27684",
        implemented="runs of few steps with an expert LoRA for each phase, the tables of Wan2.2-Lightning and Qwen-Image-Lightning, and "
        "the training: distribution matching within a subinterval, phase after phase (`diffgraft fit`)",
        omitted="full-parameter fakes, context parallelism; training of a pipeline with two denoisers (published LoRA run there)",
        licence="written from the paper's formulas; Wan2.2-Lightning and Qwen-Image-Lightning Apache-2.0, facts only",
    )
    families = ("flux", "wan", "qwen_image")
    Config = PhasedDmdConfig
    State = Phased
    neutral: ClassVar[dict[str, Any]] = dict.fromkeys(PHASES)
    active: ClassVar[dict[str, Any]] = {"steps": None, "guidance": "keep", "boundaries": (0.9, 0.7, 0.4)}
    effects = Effects(
        replaces=frozenset({"scheduler"}),
        edits=frozenset({"schedule", "weights"}),
        needs=frozenset({"calibrated_run"}),  # an expert is for its table
    )
    needs = tuple(Need("adapter", name) for name in PHASES)
    fitting = PhasedFitter
    config: PhasedDmdConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.sampler == "renoise":
            self.effects = replace(type(self).effects, stochastic=True)

    @property
    def on(self) -> bool:
        """Whether there is an expert."""
        return self.config.phase_1 is not None

    @property
    def own_table(self) -> bool:
        """Whether the levels are the plugin's, not the pipeline's."""
        return self.config.sigmas is not None or self.config.shift is not None

    # before anything is touched ----------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        for name in PHASES:
            adapter = target.given[name]
            if adapter is not None and (missing := [each for each in target.denoisers if each not in adapter.loras]):
                raise ConfigError(
                    f"plugin 'phased_dmd': {name} has no LoRA for {', '.join(missing)} of this {type(target.pipe).__name__}, which changes "
                    f"its denoiser by itself: give phase_1={{{', '.join(f'{each!r}: FILE' for each in target.denoisers)}}}, no boundaries"
                )

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        """Euler's: the experts were learned for its steps."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        if not self.on or (type(old) is FlowMatchEulerDiscreteScheduler and not old.config.get("stochastic_sampling")):
            return None
        known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters  # pipelines read others' (use_flow_sigmas)
        kept = {name: value for name, value in old.config.items() if name in known} | {"stochastic_sampling": False}
        if "shift" not in kept and old.config.get("flow_shift") is not None:
            kept["shift"] = old.config["flow_shift"]
        return FlowMatchEulerDiscreteScheduler(**kept)

    def table_of(self, own: Sequence[float]) -> list[float]:
        """Levels where the steps begin, and 0: of a run and of a fit.

        Args:
            own: of the pipeline's schedule [steps + 1], as `levels_of` reads it.
        """
        config, steps = self.config, len(own) - 1
        if config.sigmas is not None:
            return [*config.sigmas, 0.0]
        if config.shift is not None:
            shift = SHIFTS[config.shift] if isinstance(config.shift, str) else config.shift
            return [*shifted(evenly(steps), shift), 0.0]
        return list(own)

    def idle_phase(self, levels: Sequence[float]) -> str | None:
        """What to say where a phase has no step."""
        boundaries = self.config.boundaries
        found = {phase_of(level, boundaries) for level in levels[:-1]}
        missing = [k + 1 for k in range(len(boundaries) + 1) if k not in found]
        shown = ", ".join(f"{level:.4g}" for level in levels[:-1])
        return f"boundaries = {boundaries}: no step for phase {missing[0]}; the steps begin at {shown}" if missing else None

    def ensure_phases(self, levels: Sequence[float]) -> None:
        """Raises ConfigError where a phase has no step."""
        if (idle := self.idle_phase(levels)) is not None:
            raise ConfigError(f"plugin 'phased_dmd': {idle}: put a boundary at one of them, where the next expert is to begin")

    # in the run --------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Any) -> Any:
        if not self.on:
            call.note("inactive: no expert is given; name phase_1=, with the LoRA of a few-step model")
            return next(call)
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        if self.config.guidance == "off":
            call = unguided(call, "guidance='keep'")
        if self.config.number is not None:
            call = in_steps(call, self.config.number, "steps=None")
        if self.own_table:
            ensure_own_levels(call, "neither shift nor sigmas")
        return next(call)

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        made: Schedule = next(call)
        if not self.on:
            return made
        assert made.sigmas is not None  # Euler's
        own, replaced = made.sigmas.tolist(), call.run.replaced  # once a run
        said = any(call.run.arguments.get(name) is not None for name in ("timesteps", "sigmas"))
        foreign = replaced is not None and type(replaced.own) is not type(call.scheduler)
        if foreign and not self.own_table and not said:
            own = levels_by(replaced.own, call, len(made.timesteps))
        levels = self.table_of(own)
        if self.own_table or levels != made.sigmas.tolist():
            sigmas = torch.tensor(levels, dtype=torch.float64)
            made = Schedule((sigmas[:-1] * TIMES).to(made.timesteps), sigmas.to(made.sigmas))
            call.acted()
        if self.config.steps is not None:
            self.ensure_phases(levels)
        elif (idle := self.idle_phase(levels)) is not None:
            call.note(f"{idle}: its expert does nothing in this run")
        call.shared.__init__()  # of a schedule that outer plugins edit yet
        return made

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if not self.on:
            return next(call)  # type: ignore[no-any-return]
        call.shared.read(call.pipe.scheduler, self.config.boundaries)
        name = PHASES[call.shared.phases[call.step.begin + call.step.index]]
        call.count(name)
        with beside(call.model, {call.given(name).name: self.config.strength}):
            return next(call)  # type: ignore[no-any-return]

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        if not self.on or self.config.sampler == "euler":
            return out
        call.shared.read(call.scheduler, self.config.boundaries)
        at = call.step.begin + call.step.index
        t, after = call.shared.levels[at], call.shared.levels[at + 1]
        x, v = call.sample.float(), call.model_output.float()
        return StepOutput(renoised(x, v, t, after, call.noise()).to(out.sample), x - t * v)
