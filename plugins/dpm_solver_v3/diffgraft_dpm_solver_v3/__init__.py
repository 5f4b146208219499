"""DPM-Solver-v3: the diffusion ODE in the parametrisation that a model's own statistics make easiest (arXiv 2310.13268).

(Zheng, Lu, Chen, Zhu.) Instead of the noise or the data prediction, g is approximated by its Taylor polynomial: a prediction from which
what is linear in the sample, and what changes with it in first order, is taken out by l, s, b. These are measured once a model and
guidance scale: `diffgraft calibrate dpm_solver_v3`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffgraft import ArtefactMismatch, Effects, Family, Need, Plugin, Schedule, ScheduleCall, StepCall, StepOutput
from diffgraft.methods.artefacts import make_again
from diffgraft.methods.solvers import schedule_errors

from diffgraft_dpm_solver_v3.calibration import HOLDS, DPMSolverV3Calibrator
from diffgraft_dpm_solver_v3.knobs import PAPER, DPMSolverV3Config, options, settings_of
from diffgraft_dpm_solver_v3.published import published_statistics
from diffgraft_dpm_solver_v3.schedulers import DPMSolverV3Scheduler

__all__ = ["DPMSolverV3", "DPMSolverV3Calibrator", "DPMSolverV3Scheduler", "published_statistics"]
__version__ = "0.1.0"


class DPMSolverV3(Plugin):
    name = "dpm_solver_v3"
    paper = PAPER
    families = ("sd", "sdxl", "dit", "pixart", "sd3", "flux", "qwen_image", "wan")
    Config = DPMSolverV3Config
    neutral: ClassVar[dict[str, Any]] = {"order": 0}
    active: ClassVar[dict[str, Any]] = {"order": 2, "intervals": 12, "draws": 2}
    scheduler = DPMSolverV3Scheduler
    effects = Effects(replaces=frozenset({"scheduler"}), needs=frozenset({"determinism"}))
    # l, s, b are functions of lambda: any scheduler, any number of steps
    needs = (Need("artefact", "artefact", fits=frozenset(), holds=HOLDS),)
    calibration = DPMSolverV3Calibrator
    tune: ClassVar[dict[str, Any]] = {
        "order": (2, 3),
        "intervals": (50,),  # hardly matters (README), and a calibration takes time in proportion
        "draws": (4,),  # with the few prompts of a search, less is worse than no statistics
    }
    config: DPMSolverV3Config

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if self.config.order == 0:
            return None
        return DPMSolverV3Scheduler.from_config(settings_of(old, family), **options(self.config))

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        artefact = call.given("artefact")
        if self.config.order == 0:
            return next(call)  # type: ignore[no-any-return]
        if artefact is None:
            call.note(f"no artefact: l = 1, s = b = 0, which is DPM-Solver++; {make_again(self.name, 'artefact')}")
        else:
            try:
                call.scheduler.set_statistics(*(artefact.tensors[name] for name in "lsb"), ends=tuple(artefact.facts["ends"]))
            except (KeyError, ValueError) as error:
                raise ArtefactMismatch(f"dpm_solver_v3: the artefact does not fit: {error}; {make_again(self.name, 'artefact')}") from error
            scale, made = call.run.guidance_scale(call.family.denoisers[0]), artefact.facts.get("guidance_scale")
            if made is not None and scale is not None and float(scale) != made:
                call.note(f"guidance scale {scale:g}, but l, s, b were measured at {made:g}: usable, but not the best (paper)")
        with schedule_errors(self.name):
            return next(call)  # type: ignore[no-any-return]

    def step(self, call: StepCall, next: Any) -> StepOutput:
        artefact = call.given("artefact")
        if self.config.order and artefact is not None and call.step.index == 0:
            needed, found = tuple(artefact.tensors["l"].shape[1:]), tuple(call.sample.shape[1:])
            if len(needed) != len(found) or any(n not in (1, size) for n, size in zip(needed, found, strict=True)):
                raise ArtefactMismatch(
                    f"dpm_solver_v3: the artefact's l, s, b have shape {needed}, this run's samples {found}; "
                    f"{make_again(self.name, 'artefact')} at this size, or with -o dpm_solver_v3.ems_shape=channel for any size"
                )
        return next(call)  # type: ignore[no-any-return]
