"""USF and S3: a solver that changes from step to step, and the search for it (Liu, Ning, Yang, Wang, arXiv 2312.07243).

At every step the unified sampling framework decides anew: where to go, whether noise or clean sample is extrapolated, by a polynomial of
which order through which earlier values, how its slope is relaxed, and whether the step is done again when its end is known. DDIM,
DPM-Solver(++) and UniPC are fixed choices of these; `diffgraft evolve usf_s3` searches others for one model and number of steps.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffgraft import ArtefactMismatch, Call, ConfigError, Effects, Family, Need, Plugin, Schedule, ScheduleCall, Target
from diffgraft.methods.artefacts import make_again
from diffgraft.methods.findings import Finding

from diffgraft_usf_s3.decisions import Corrector, Decision, SolverSchedule, known_solver, solver_schedule
from diffgraft_usf_s3.knobs import PAPER, USFConfig, scheduler_like
from diffgraft_usf_s3.schedulers import SolverScheduleScheduler
from diffgraft_usf_s3.searcher import HOLDS, S3Searcher

__all__ = [
    "USFS3",
    "Corrector",
    "Decision",
    "S3Searcher",
    "SolverSchedule",
    "SolverScheduleScheduler",
    "USFConfig",
    "known_solver",
    "solver_schedule",
]  # fmt: skip
__version__ = "0.1.0"


NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


def other_noise(artefact: Finding, scheduler: SolverScheduleScheduler) -> str | None:
    """In what the noise levels or the words of the denoiser that a schedule was found for are others; which solver was there makes no
    difference."""
    told = artefact.made_for.scheduler_config or {}
    keys = NOISE[:1] if scheduler.noise.flow else (*NOISE, "prediction_type")
    found = [f"{key} = {told[key]!r}, here {scheduler.config[key]!r}" for key in keys if key in told and told[key] != scheduler.config[key]]
    return "; ".join(found) or None


class USFS3(Plugin):
    """Follow a solver schedule (see :mod:`.method`)."""

    name = "usf_s3"
    paper = PAPER
    families = ("sd", "sdxl", "dit", "pixart", "sd3", "flux", "qwen_image", "wan", "ltx2", "ltx2_image")
    Config = USFConfig
    neutral: ClassVar[dict[str, Any]] = {"solver": "off"}
    active: ClassVar[dict[str, Any]] = {"solver": "unipc"}
    scheduler = SolverScheduleScheduler
    effects = Effects(replaces=frozenset({"scheduler"}), edits=frozenset({"schedule"}), needs=frozenset({"determinism", "calibrated_run"}))
    needs = (Need("search", "artefact", fits=frozenset({"guidance"}), holds=HOLDS),)
    search = S3Searcher
    config: USFConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.artefact is None and self.config.schedule is None:  # a known solver goes at any number of steps
            self.effects = Effects(replaces=frozenset({"scheduler"}), needs=frozenset({"determinism"}))

    def chosen(self, artefact: Finding | None) -> SolverSchedule | None:
        """What the knobs say; None: a known solver, or the plugin is off."""
        if self.config.solver == "off":
            return None
        return self.config.schedule if artefact is None else SolverSchedule.parse(artefact.genome)

    def check(self, target: Target) -> None:
        if self.config.solver == "off":
            return
        artefact = target.given.get("artefact")
        chosen = self.chosen(artefact)
        scheduler = scheduler_like(target.pipe.scheduler, target.family)
        if artefact is not None and (why := other_noise(artefact, scheduler)):
            raise ArtefactMismatch(
                f"usf_s3: the artefact was found with other settings of the scheduler: {why}; {make_again('usf_s3', 'search')}"
            )
        if chosen is not None:
            try:
                scheduler.checked(chosen)
            except ValueError as error:
                raise ConfigError(f"plugin 'usf_s3': {error}") from error

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if self.config.solver == "off":
            return None
        return scheduler_like(old, family, self.config.solver, self.config.order)

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        artefact = call.given("artefact")
        if self.config.solver == "off":
            return next(call)  # type: ignore[no-any-return]
        chosen = self.chosen(artefact)
        if chosen is not None:
            self._beside_the_callers(call)
        try:
            call.scheduler.set_schedule(chosen)
            return next(call)  # type: ignore[no-any-return]
        except ValueError as error:
            if artefact is not None:
                raise ArtefactMismatch(f"plugin 'usf_s3': {error}, or {make_again('usf_s3', 'search')}") from error
            raise ConfigError(f"plugin 'usf_s3': {error}") from error

    def _beside_the_callers(self, call: Call) -> None:
        """What the call itself says about its times; raises ConfigError where both name them."""
        for name in ("timesteps", "sigmas", "denoising_start", "denoising_end"):
            if call.run.arguments.get(name) is not None:
                other = "has its own" if name in ("timesteps", "sigmas") else "is of a whole run, at its own timesteps"
                raise ConfigError(
                    f"plugin 'usf_s3': the call gives {name} = {call.run.arguments[name]}, and the solver schedule {other}: leave it "
                    "out of the call, or run a known solver (solver='unipc') without artefact and schedule"
                )
