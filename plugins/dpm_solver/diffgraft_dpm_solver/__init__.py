"""DPM-Solver: the diffusion ODE in half log-SNR, singlestep, with fixed or adaptive step sizes (Lu et al., arXiv 2206.00927).

In lambda = log(alpha / sigma) the linear part of the ODE is solved exactly, and only the prediction is a function to be approximated. A
step of order p asks the denoiser p times. Adaptive, two orders are compared and every sample of a batch chooses its own steps.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    ConfigError,
    ControlCall,
    DenoiseCall,
    Effects,
    Family,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)  # fmt: skip
from diffgraft.methods.predictions import is_exploding
from diffgraft.methods.solvers import ode_settings, schedule_errors
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from diffgraft_dpm_solver.schedulers import DPMSolverScheduler

__all__ = ["DPMSolver", "DPMSolverScheduler"]
__version__ = "0.1.0"


ADAPTIVE = ("atol", "rtol", "h_init", "theta")
"""Knobs of adaptive runs alone."""


class DPMSolverConfig(PluginConfig):
    """Knobs of DPM-Solver."""

    order: int = Field(3, ge=0, le=3, description="p: calls of a step; adaptive: of the higher of two orders (2: DPM-Solver-12, 3: -23); "
                       "0 leaves the pipeline's own scheduler")  # fmt: skip
    form: Literal["data", "noise"] = Field(
        "data", description="what is held over a step: x0_theta (DPM-Solver++, which guidance needs) or eps_theta (DPM-Solver)"
    )
    mode: Literal["fast", "fixed", "adaptive"] = Field(
        "fast", description="fast: for any number of calls, lower orders at the end; fixed: this order only (a multiple of it as calls); "
        "adaptive: num_inference_steps are at most how many calls"
    )  # fmt: skip
    spacing: Literal["logsnr", "time", "quadratic"] = Field(
        "logsnr", description="of the steps: uniform in lambda (paper), t (flow models: the pipeline's sigmas) or sqrt(t)"
    )
    denoise_to_zero: bool = Field(False, description="the last of the calls takes away the noise that is left at the end of the schedule")
    atol: float = Field(0.0078, ge=0, description="epsilon_atol, adaptive: absolute tolerance; 2/255 for pictures in [-1, 1] (paper)")
    rtol: float = Field(0.05, ge=0, description="epsilon_rtol, adaptive: relative tolerance")
    h_init: float = Field(0.05, gt=0, description="h_init, adaptive: first step in lambda")
    theta: float = Field(0.9, gt=0, lt=1, description="theta, adaptive: safety, how much of the step that the error allows is taken")

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.mode == "adaptive" and self.order == 1:
            raise ValueError("order = 1 with mode = 'adaptive': it compares two orders; give order 2 or 3")
        if self.mode == "adaptive" and self.atol == self.rtol == 0:
            raise ValueError("atol = rtol = 0: no step would ever be accepted; give one of them")
        unused = [name for name in ADAPTIVE if getattr(self, name) != type(self).model_fields[name].default]
        if self.mode != "adaptive" and unused:
            raise ValueError(f"{unused[0]} = {getattr(self, unused[0])} with mode = {self.mode!r}: only mode='adaptive' has tolerances")
        return self


@dataclass
class Last:
    """The last prediction of a guidance branch; of a run its ``counts`` (see ``DPMSolverScheduler``) and how many calls it had."""

    prediction: Tensor | None = None
    counts: dict[str, Tensor] = field(default_factory=dict)
    budget: int = 0


class DPMSolver(Plugin):
    name = "dpm_solver"
    paper = Paper(
        title="DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
        arxiv="2206.00927",
        implemented="DPM-Solver-1, -2, -3, DPM-Solver-fast, DPM-Solver-12 and -23 with adaptive steps, denoise_to_zero, in the noise form "
        "and in the data form of DPM-Solver++ (2211.01095)",
        omitted="the multistep solvers and dynamic thresholding, which diffusers has; the 'taylor' variants; inversion",
        licence="official code MIT, read for facts; written from the equations",
    )
    families = (
        *("sd", "sdxl", "animatediff", "dit", "pixart", "sd3", "flux", "flux_kontext", "flux_fill", "qwen_image"),
        *("wan", "ltx", "ltx2", "ltx2_image", "anima", "sdxl_modular", "flux_modular", "wan_modular"),
    )
    Config = DPMSolverConfig
    State = Last
    neutral: ClassVar[dict[str, Any]] = {"order": 0}
    active: ClassVar[dict[str, Any]] = {"order": 2}
    scheduler = DPMSolverScheduler
    effects = Effects(replaces=frozenset({"scheduler"}), needs=frozenset({"determinism"}))
    """Of planned runs, whose calls are asked about points of one path at falling times; see ``__init__`` for adaptive ones."""
    tune: ClassVar[dict[str, Any]] = {"order": (3, 2)}
    config: DPMSolverConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.mode == "adaptive":  # a rejected trial goes back, and what a cache reuses would look like no error at all
            self.effects = Effects(
                replaces=frozenset({"scheduler"}), skips=frozenset({"denoiser"}), edits=frozenset({"timestep"}),
                needs=frozenset({"determinism", "own_steps", "all_blocks"}),
            )  # fmt: skip

    @property
    def adapts(self) -> bool:
        """Whether samples choose their steps."""
        return self.config.mode == "adaptive" and self.config.order > 0

    def check(self, target: Target) -> None:
        if not self.adapts:
            return
        name = type(target.pipe).__name__
        if target.family.companion:
            raise Unsupported(
                f"dpm_solver: {name} denoises a sound at the picture's times, and with mode='adaptive' each would choose its own; take "
                "mode='fast'"
            )
        if len(target.denoisers) > 1:
            raise Unsupported(
                f"dpm_solver: {name} takes one of two denoisers by the time of a step, and with mode='adaptive' each sample has its own; "
                "take mode='fast'"
            )
        if "Inpaint" in name:
            raise Unsupported(
                f"dpm_solver: {name} puts the known part back at one time for all samples, and with mode='adaptive' each has its own; take "
                "mode='fast'"
            )

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        c = self.config
        if c.order == 0:
            return None
        settings = ode_settings(self.name, old, family)
        if family.prediction == "flow":
            settings["prediction_type"] = "flow_prediction"
        known = inspect.signature(DPMSolverScheduler.__init__).parameters
        knobs = {name: value for name, value in c.model_dump().items() if name in known}
        return DPMSolverScheduler.from_config(
            {key: value for key, value in settings.items() if key in known},
            **knobs, solver_order=c.order, together=False, exploding=family.prediction != "flow" and is_exploding(old),
        )  # fmt: skip

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        given = call.run.arguments
        if self.config.order and self.config.spacing != "time" and call.family.prediction == "flow" and given.get("sigmas") is not None:
            raise ConfigError(f"plugin 'dpm_solver': sigmas were given, but spacing = {self.config.spacing!r} makes its own; give 'time'")
        if self.adapts and (cut := [name for name in ("denoising_start", "denoising_end") if isinstance(given.get(name), float)]):
            raise Unsupported(
                f"dpm_solver: {cut[0]} cuts the run at a share of its calls, and with mode='adaptive' nobody knows where these are; take "
                "mode='fast'"
            )
        with schedule_errors(self.name):
            return next(call)  # type: ignore[no-any-return]

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if not self.adapts:
            return next(call)  # type: ignore[no-any-return]
        scheduler, last = call.pipe.scheduler, call.state
        if call.agree(scheduler.done) and last.prediction is not None:
            call.count("skipped")
            return last.prediction  # type: ignore[no-any-return]
        last.prediction = next(told(call, scheduler.times(), call.family.timestep, call.sample.shape[0]))
        return last.prediction  # type: ignore[no-any-return]

    def control(self, call: ControlCall, next: Any) -> Any:
        if not self.adapts:
            return next(call)
        sample = call.get("sample", call.get("hidden_states"))
        return next(told(call, call.pipe.scheduler.times(), "timestep", sample.shape[0]))

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        if self.adapts:
            call.acted()
            copies = 2 if call.family.guidance.doubled and call.run.guidance_active() else 1
            call.shared.budget = call.step.calls
            call.shared.counts = {name: value[: len(value) // copies] for name, value in call.scheduler.counts.items()}
        return out

    def run(self, call: RunCall, next: Any) -> Any:
        result = next(call)
        if self.adapts and call.shared.counts:
            self._tell(call, call.shared.counts, call.shared.budget)
        return result

    @staticmethod
    def _tell(call: RunCall, counts: dict[str, Tensor], budget: int) -> None:
        """What the samples of the last pass did, read from the device once a run."""
        call.record(counts)
        for name in ("accepted", "rejected"):
            call.count(name, int(counts[name].sum()))
        if forced := int((counts["forced"] > 0).sum()):
            call.note(
                f"{forced} of {len(counts['forced'])} samples came to the end of their {budget} calls before the tolerances allowed it "
                "and went the rest in even steps: give more num_inference_steps, or a larger rtol or atol"
            )


def told(call: Any, times: Tensor | None, name: str, rows: int) -> Any:
    """``call`` with each sample's own time.

    Raises:
        Unsupported: the pipeline has times for parts of a sample.
    """
    old = call[name]
    if old.ndim > 1:
        raise Unsupported("dpm_solver: this pipeline tells its denoiser a time for each token; take mode='fast'")
    if times is None:
        return call
    own = call.family.told(times).to(old.dtype if old.is_floating_point() else torch.float32)
    return call.replace(**{name: own.repeat(rows // len(own))})
