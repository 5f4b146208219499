"""The knobs of USF, and the schedulers that it can take the place of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from diffgraft import Family, Paper, PluginConfig
from diffgraft.methods.findings import Finding
from diffgraft.methods.solvers import ode_settings
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from diffgraft_usf_s3.decisions import SolverSchedule
from diffgraft_usf_s3.schedulers import SolverScheduleScheduler

PAPER = Paper(
    title="A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models",
    arxiv="2312.07243",
    implemented="the unified sampling framework as a scheduler (timesteps, eps or x0, orders 1 to 4, Taylor-difference derivatives with "
    "chosen active points, relaxation, pseudo corrector, start points, analytical first step) and S3, the search for its decisions",
    omitted="DPM-Solver-v3's prediction type; scaled skip connections; the implicit corrector (another call); the predictor that ranks "
    "candidates; the dataset's mean as analytical first step",
    licence="official code without a licence; read for facts, written from the equations",
)


class USFConfig(PluginConfig):
    """Knobs of USF."""

    artefact: str | Path | Finding | None = Field(
        None, description="what `diffgraft evolve usf_s3` found: a path, owner/name/file.json on the Hub, or a Finding"
    )
    schedule: SolverSchedule | None = Field(
        None, description="a solver schedule by hand: a path to a JSON file, JSON text, or a dict of timesteps, end and steps"
    )
    solver: Literal["off", "ddim", "dpm", "dpm++", "dpm++ heun", "unipc", "unipc bh1", "dpm++ 2s"] = Field(
        "unipc",
        description="without artefact and schedule: this known solver, at any number of steps; 'off' leaves the pipeline's scheduler",
    )
    order: int = Field(2, ge=1, le=3, description="n of the known solver, where it comes in several orders")

    @field_validator("schedule", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        return value if value is None else SolverSchedule.parse(value)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.artefact is not None and self.schedule is not None:
            raise ValueError("artefact, schedule exclude each other: give one")
        if (self.artefact is None and self.schedule is None) or self.solver == "off":
            return self
        source = "artefact" if self.schedule is None else "schedule"
        for name in ("solver", "order"):
            given, default = getattr(self, name), type(self).model_fields[name].default
            if given != default:
                raise ValueError(
                    f"{name} = {given!r} is of a known solver, and {source} says what each step does: {source}=None runs the known solver, "
                    f"{name}={default!r} (the default) leaves it to {source}"
                )
        return self


def scheduler_like(old: Any, family: Family, solver: str = "unipc", order: int = 2) -> SolverScheduleScheduler:
    """The scheduler that solves the ODE of the pipeline's ``old`` one.

    Raises:
        Unsupported: ``old`` is stochastic, belongs to a distilled model, clips its x0, or has a noise schedule that is not known here.
    """
    config = ode_settings("usf_s3", old, family)
    if family.prediction == "flow":
        config["prediction_type"] = "flow_prediction"
    known = inspect.signature(SolverScheduleScheduler.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known}
    made: SolverScheduleScheduler = SolverScheduleScheduler.from_config(settings, solver=solver, solver_order=order)
    return made
