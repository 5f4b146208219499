"""BDIA: a solver whose steps can be undone exactly (Zhang, Lewis, Kleijn, arXiv 2307.10829).

DDIM's step from z_i averages over an interval; BDIA also takes the step back from z_i into account and so ties three states together by an
equation that can be solved for either end. A run is its own inverse: `diffgraft invert bdia` walks from a picture to a pair of latents, and
``start=`` walks back from there, with the same prompt to the same picture, with another to an edit of it.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffgraft import ConfigError, Effects, Family, Inverter, Need, Paper, Plugin, PluginConfig, RunCall, Schedule, ScheduleCall
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.schema import Holds, Values
from diffgraft.methods.solvers import ode_settings, schedule_errors
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from diffgraft_bdia.asked import ensure_batch, with_size_of
from diffgraft_bdia.schedulers import BDIAScheduler, FlowBDIAScheduler

__all__ = ["BDIA", "BDIAScheduler", "FlowBDIAScheduler"]
__version__ = "0.1.0"


class BDIAConfig(PluginConfig):
    """Knobs of BDIA."""

    gamma: float = Field(
        1.0,
        ge=0,
        le=1,
        description="gamma: weight of the step back; 1 is exact to invert, 0.5 more accurate in few steps; 0 leaves the pipeline's own "
        "scheduler",
    )
    precision: Literal["float32", "float64"] = Field("float32", description="in which the two states are kept; float64 for smaller gamma")
    strength: float = Field(
        1.0, gt=0, le=1, description="of an inversion: the share of the steps that it walks up; a run with `start` follows its code"
    )
    start: str | Path | Artefact | None = Field(
        None, description="a picture's code, made by `diffgraft invert bdia`: the run makes that picture again, or edits it"
    )


class Walk(TypedDict):
    """Of a code's knobs: those that must be the same on the way back."""

    gamma: Annotated[float, Field(gt=0, le=1)]


class Facts(TypedDict):
    """Of a code."""

    knobs: Walk
    guidance_scale: NotRequired[Annotated[float, Field(allow_inf_nan=False)] | None]


LATENTS = Values((...,))
PLACE = {"sigma": Values((), low=0), "steps": Values((), (torch.int64,), low=1)}
HOLDS = Holds({"noise": LATENTS, "neighbour": LATENTS, **PLACE}, Facts)


def scheduler_for(old: Any, family: Family, **options: Any) -> Any:
    """A BDIA scheduler on the noise schedule of ``old``.

    Raises:
        Unsupported: ``old`` draws noise, belongs to a distilled model, clips its x0, or has a noise schedule that BDIA does not know.
    """
    cls = FlowBDIAScheduler if family.prediction == "flow" else BDIAScheduler
    known = inspect.signature(cls.__init__).parameters
    return cls.from_config({key: value for key, value in ode_settings("bdia", old, family).items() if key in known}, **options)


class BDIA(Plugin):
    name = "bdia"
    paper = Paper(
        title="Exact Diffusion Inversion via Bi-directional Integration Approximation",
        arxiv="2307.10829",
        implemented="BDIA-DDIM and its flow-matching Euler form as schedulers; exact inversion of pictures to a pair of latents, and back",
        omitted="BDIA on EDM's parametrisation (its models run as variance-preserving ones); editing by attention control",
        licence="official code MIT; written from the paper's equations",
    )
    families = ("sd", "sdxl", "animatediff", "dit", "pixart", "sd3", "flux", "flux_kontext", "flux_fill", "qwen_image", "wan", "ltx")
    Config = BDIAConfig
    neutral: ClassVar[dict[str, Any]] = {"gamma": 0.0}
    active: ClassVar[dict[str, Any]] = {"gamma": 0.5}
    scheduler = BDIAScheduler
    effects = Effects(replaces=frozenset({"scheduler"}), needs=frozenset({"determinism"}))
    needs = (Need("inversion", "start", fits=frozenset({"steps", "shape"}), holds=HOLDS),)
    config: BDIAConfig

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if self.config.gamma == 0:
            return None
        return scheduler_for(old, family, gamma=self.config.gamma, precision=self.config.precision)

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.gamma == 0:
            call.note("inactive: gamma is 0, so the pipeline's own scheduler makes the steps")
        code = call.given("start")
        if code is None:
            return next(call)
        if code.facts["knobs"]["gamma"] != self.config.gamma:
            raise ConfigError(
                f"plugin 'bdia': gamma = {self.config.gamma}, but start was made with gamma = {code.facts['knobs']['gamma']}: "
                "a walk is undone by one of the same gamma"
            )
        if call.get("latents") is not None:
            raise ConfigError(
                "plugin 'bdia': latents were given (by the call, or a plugin further out), but start says where the run begins; "
                "leave them out, or take start off (pipe.plugins.configure('bdia', start=None))"
            )
        noise, arguments = code.tensors["noise"], call.arguments()
        rows = ensure_batch(noise, call.family, arguments)
        size = with_size_of(noise, call.pipe, call.family, self._named(call))
        noise = noise.to(call.pipe._execution_device, call.pipe.dtype)
        return next(self._with_guidance_of(code, call).replace(latents=noise.expand(rows, *noise.shape[1:]).contiguous(), **size))

    @staticmethod
    def _named(call: RunCall) -> dict[str, Any]:
        """The arguments that the caller gave; packed latents do not tell their size, and there the checkpoint's own size counts too."""
        return {name: value for name, value in call.arguments().items() if name in call.said or call.family.latents == "packed"}

    @staticmethod
    def _with_guidance_of(code: Artefact, call: RunCall) -> RunCall:
        """``call`` under the guidance of the code's walk, unless the caller named one."""
        scale, made = call.family.guidance.scale, code.facts.get("guidance_scale")
        if made is None:
            return call
        if scale not in call.said:
            return call.replace(**{scale: made})  # type: ignore[no-any-return]
        if call[scale] != made:
            call.note(f"start was made with {scale} = {made:g}, this run has {call[scale]:g}: the walk is not undone, the picture changes")
        return call

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        with schedule_errors(self.name):
            whole: Schedule = next(call)
        if (code := call.given("start")) is None or self.config.gamma == 0:
            return whole
        device = call.pipe._execution_device
        call.scheduler.start_from(code.tensors["noise"].to(device), code.tensors["neighbour"].to(device))
        return rest_of(whole, code) if code.facts["knobs"].get("strength", 1.0) < 1 else whole


def rest_of(whole: Schedule, code: Artefact) -> Schedule:
    """The part of a schedule that leads from where an inversion stopped to the picture.

    Raises:
        ConfigError: that place is not in this schedule.
    """
    assert whole.sigmas is not None
    steps, sigma, among = code.made_for.steps, float(code.tensors["sigma"]), int(code.tensors["steps"])
    place = len(whole.timesteps) - steps
    if place < 0 or not math.isclose(float(whole.sigmas[place]), sigma, rel_tol=1e-4):
        raise ConfigError(
            f"plugin 'bdia': start was walked up {steps} of {among} steps, to sigma = {sigma:.4g}, which this schedule of "
            f"{len(whole.timesteps)} steps has not at that place: call it with num_inference_steps={among}, as in the inversion"
        )
    return Schedule(whole.timesteps[place:], whole.sigmas[place:])


class BDIAInverter(Inverter):
    """Walks from a picture's latents to the noise."""

    name = "bdia inversion"
    paper = BDIA.paper
    Config = BDIAConfig
    scheduler = BDIAScheduler
    effects = replace(BDIA.effects, needs=BDIA.effects.needs | {"all_blocks"})
    """A walk through a cache's answers is undone by no run without it."""
    config: BDIAConfig

    def make_scheduler(self, old: Any, family: Family) -> Any:
        knobs = self.config
        return scheduler_for(old, family, gamma=knobs.gamma, precision=knobs.precision, strength=knobs.strength, inverse=True)

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        with schedule_errors("bdia"):
            return next(call)  # type: ignore[no-any-return]

    def collect(self, call: RunCall) -> dict[str, Any]:
        return call.pipe.scheduler.pair()


BDIA.inversion = BDIAInverter
