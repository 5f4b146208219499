"""Error-controlled forecasts: an adaptive cache without calibration, for any denoiser that follows a path.

A denoiser's output v is a smooth function of the noise level along a deterministic path. After some computed calls the next outputs are
forecast by the polynomial through the last ones, and the denoiser is not asked. Each computed call is forecast too, so it says how wrong
a forecast was; interpolation's remainder carries that error over to the calls ahead, and those are forecast whose error stays below a
tolerance. It is what step-size control is in an ODE solver, for a cache.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import DenoiseCall, Effects, Family, Paper, Plugin, PluginConfig, RunCall, Unsupported
from diffgraft.methods.predictions import is_flow, levels_at
from diffgraft.methods.solvers import asks_once_a_step, place_in
from pydantic import Field
from torch import Tensor

from diffgraft_forecast.method import distance, extrapolated, relative_error

__all__ = ["Forecast"]
__version__ = "0.1.0"

FORGET = 0.5
"""Of the constant of the error from one measurement to the next: one that happens to be small is not believed at once."""


class ForecastConfig(PluginConfig):
    """Knobs of :class:`Forecast`."""

    tolerance: float = Field(
        0.05,
        ge=0,
        le=100,
        description="largest relative error of a forecast, || p - v || / || v ||, that is expected where it is used; 0: off",
    )
    order: int = Field(1, ge=0, le=4, description="degree of the polynomial: it goes through the last order + 1 computed outputs")
    max_skip: int = Field(
        0, ge=0, le=1000, description="most denoiser calls of a branch in a row that are forecast; 0: as many as the tolerance allows"
    )


@dataclass
class Path:
    """Of a branch: its last computed outputs. Of the run: where it is, and how wrong forecasts were."""

    key: Any = None
    at: int = -1
    """The last call that was answered."""
    nodes: list[float] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    measured: bool = False
    """Whether an output of this branch was forecast and then computed."""
    # of the run
    timesteps: Any = None
    thetas: list[float] = field(default_factory=list)
    """Of each of the scheduler's calls."""
    forecasts: bool = False
    """Whether this step is forecast, in all its branches."""
    in_a_row: int = 0
    errors: list[Tensor] = field(default_factory=list)
    """Of the forecasts for the last computed step, over their distance."""
    constant: float = math.inf
    """Of the error: what it is expected to be over its distance."""
    told: list[Tensor] = field(default_factory=list)

    def keep(self, theta: float, v: Tensor, most: int) -> None:
        """One more computed output; where a level is asked twice (PLMS), the later one."""
        if theta in self.nodes:
            del self.values[self.nodes.index(theta)]
            self.nodes.remove(theta)
        self.nodes, self.values = [*self.nodes, theta][-most:], [*self.values, v][-most:]


class Forecast(Plugin):
    name = "forecast"
    paper = Paper(
        title="none: a method of diffgraft's own (forecasts as in TaylorSeer, which the number is of; step-size control as in ODE solvers)",
        arxiv="2503.06923",
        implemented="Lagrange forecasts of the whole denoiser's output over the angle of the noise level, and their error control",
        omitted="TaylorSeer's forecasts inside the blocks, and its fixed interval (see diffusers_cache)",
        licence="written for diffgraft",
    )
    families = ("*",)
    Config = ForecastConfig
    State = Path
    neutral: ClassVar[dict[str, Any]] = {"tolerance": 0.0}
    active: ClassVar[dict[str, Any]] = {"tolerance": 100.0, "order": 0}
    effects = Effects(skips=frozenset({"denoiser"}), couples_batch=True)
    tune: ClassVar[Mapping[str, tuple[Any, ...]]] = {"tolerance": (0.01, 0.02, 0.05, 0.1, 0.2), "order": (1, 2)}
    config: ForecastConfig

    def run(self, call: RunCall, next: Any) -> Any:
        scheduler, name = call.pipe.scheduler, type(call.pipe.scheduler).__name__
        if self.config.tolerance and not asks_once_a_step(scheduler):
            raise Unsupported(
                f"forecast: {name} asks the denoiser more than once a step, at points that are on no path together; use one that "
                "asks once (Euler, DDIM, DPMSolverMultistep, UniPC, FlowMatchEuler)"
            )
        result = next(call)
        if told := call.shared.told:
            call.record({"error": torch.stack(told).float().cpu()})
        return result

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        path: Path = call.state
        plan: Path = call.shared
        if not self.config.tolerance or call.extra or call.step.call == path.at:
            return next(call)  # type: ignore[no-any-return]  # asked again, by a plugin further out: no step of its own
        theta = theta_of(call, plan)
        if theta is None:  # a session at a level of the caller's own: calls that follow no path
            return next(call)  # type: ignore[no-any-return]
        x = call.sample
        key = (call.model_name, call.branches, x.shape, x.dtype, x.device)
        if key != path.key or call.step.call < path.at:  # the first call, guidance cut, another denoiser, window or size
            path.key, path.nodes, path.values, path.measured = key, [], [], False
        if call.step.call != plan.at:
            self.decide(call, path, plan, theta)
        path.at = plan.at = call.step.call
        ready = len(path.nodes) == self.config.order + 1
        if plan.forecasts and self.expected(path, plan, theta) <= self.config.tolerance:
            call.count("steps skipped")
            out = extrapolated(path.nodes, path.values, theta)
            if call.family.companion is None:
                return out
            sounds = [call.companion_of(v) for v in path.values]  # LTX-2: forecast as the picture is
            return call.accompanied(out, extrapolated(path.nodes, sounds, theta))  # type: ignore[no-any-return]
        v = next(call)
        if call.family.companion is not None:
            call.accompanied(v, call.companion_of(v))  # an inner plugin may have made another tensor of the picture
        call.count("steps computed")
        if ready and theta not in path.nodes:
            error = relative_error(extrapolated(path.nodes, path.values, theta), v)
            plan.errors.append(error / distance(path.nodes, theta))
            plan.told.append(error)
            path.measured = True
        path.keep(theta, v, self.config.order + 1)
        return v  # type: ignore[no-any-return]

    def decide(self, call: DenoiseCall, path: Path, plan: Path, theta: float) -> None:
        """At the first call of a step: whether it is forecast, by what the last computed step told."""
        if call.step.call < plan.at:  # a new window of frames
            plan.errors, plan.constant = [], math.inf
        if plan.errors:
            measured = call.agree(float(torch.stack(plan.errors).max()))  # check: allow host_sync because the decision needs the number
            plan.constant = measured if math.isinf(plan.constant) else max(measured, FORGET * plan.constant)
            plan.errors = []
        allowed = not self.config.max_skip or plan.in_a_row < self.config.max_skip
        plan.forecasts = allowed and self.expected(path, plan, theta) <= self.config.tolerance
        plan.in_a_row = plan.in_a_row + 1 if plan.forecasts else 0

    def expected(self, path: Path, plan: Path, theta: float) -> float:
        """The error of a forecast for a branch. Each branch is asked: one that was away for some steps (guidance that is cut off and comes
        back) has old nodes, and one that is new was never measured."""
        known = path.measured and len(path.nodes) == self.config.order + 1 and theta not in path.nodes
        return plan.constant * distance(path.nodes, theta) if known else math.inf


def theta_of(call: DenoiseCall, plan: Path) -> float | None:
    """Where on its path this call is; None where it is at none of the schedule's levels."""
    timesteps = call.pipe.scheduler.timesteps
    if plan.timesteps is not timesteps:
        plan.timesteps, plan.thetas = timesteps, thetas_of(call.family, call.pipe.scheduler)
    at = place_in(timesteps, call.step.t)
    return None if at is None else plan.thetas[at]


def thetas_of(family: Family, scheduler: Any) -> list[float]:
    """theta of each timestep, in which a denoiser's output is smooth from pure noise to none: sigma of flow models, the angle atan(s / a)
    of others; the timestep itself where a scheduler says no levels. Read once a run."""
    timesteps, sigmas = scheduler.timesteps, getattr(scheduler, "sigmas", [None] * len(scheduler.timesteps))
    try:
        levels = [levels_at(family, scheduler, t, sigma, timesteps.device) for t, sigma in zip(timesteps, sigmas, strict=False)]
    except Unsupported:
        return timesteps.tolist()  # type: ignore[no-any-return]  # check: allow host_sync because it is read once a run
    theta = [s if is_flow(family, scheduler) else torch.atan2(s, a) for a, s in levels]
    return torch.stack(theta).tolist()  # type: ignore[no-any-return]  # check: allow host_sync because it is read once a run
