"""Rollover budget forcing: search among the children of a flow model's SDE for the picture that a reward likes best.

(Kim, Yoon, Hwang, Sung, arXiv 2503.19385.) A flow model's ODE has one path for each noise. An SDE with the same marginals has many, on the
variance-preserving interpolant ones that differ more; a search proposes them one by one, keeps what the reward prefers, and lends
evaluations that a step did not need to the next.

The pipeline's own loop is the search's: each turn evaluates one candidate, with the pipeline's guidance, adapters and whatever else is on
its denoiser; ``scheduler.step`` decodes and judges it and hands back the next one. So a turn is one function evaluation, and there are
exactly ``max_nfe`` of them.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace
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
    RewardError,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.decoding import decode, ensure_decodes
from diffgraft.methods.inputs import parameters
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffgraft_rbf_search.method import Grid, Shape, Way, quota
from diffgraft_rbf_search.schedulers import FlowSDEScheduler, VPFlowScheduler
from diffgraft_rbf_search.search import Search, captions, nominal

__all__ = ["FlowSDEScheduler", "RBFSearch", "VPFlowScheduler"]
__version__ = "0.1.0"


class RBFSearchConfig(PluginConfig):
    """Knobs of the sampler and of the search."""

    reward: Any = Field(
        None,
        description="r: what the picture is searched for, a callable (images, prompts) -> numbers or the name of one; none: no search, the "
        "SDE alone",
    )
    max_nfe: int = Field(500, ge=3, description="function evaluations of a picture: predictions, guidance done, each decoded and judged")
    particles: int = Field(25, ge=1, description="evaluations of these that choose the initial noise (not of best_of_n)")
    search: Way = Field(
        "rbf",
        description="rollover budget forcing, or what it is compared with: the best child of each step (svdd), whole paths (best_of_n)",
    )
    interpolant: Literal["vp", "linear"] = Field("vp", description="vp: variance-preserving, paths differ more; linear: the model's own")
    norm: float = Field(3.0, ge=0, description="strength of the noise, g_r = norm r^2; 0 is the ODE (without a reward, or with best_of_n)")
    diffusion: Shape = Field("square", description="g_r: norm r^2 (square), or norm times another of the official code's forms of r")
    grid: Grid = Field(
        "exp", description="times r of uniform t: sqrt(1 - (1 - t)^2) (exp), t (uniform), or those of the pipeline's own levels (pipeline)"
    )
    beta_min: float = Field(0.1, gt=0, description="beta_min of the vp interpolant")
    beta_max: float = Field(20.0, gt=0, description="beta_max of the vp interpolant")
    result: Literal["last", "best"] = Field("last", description="the best picture of the step at which the budget ends, or of all steps")
    captions: str | tuple[str, ...] | None = Field(None, description="what the reward is given as prompts; none: the call's own")
    record: bool = Field(False, description="keep level and reward of every evaluation in the report")

    @field_validator("reward")
    @classmethod
    def _named_or_callable(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, str) and not callable(value):
            raise ValueError("give a callable (images, prompts) -> numbers, or the name of one")
        return value

    @model_validator(mode="after")
    def _can_search(self) -> RBFSearchConfig:
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min = {self.beta_min} is above beta_max = {self.beta_max}")
        if self.reward is not None and self.norm == 0 and self.search != "best_of_n":
            raise ValueError(
                "norm = 0 with a reward: without noise all children of a state are one; give norm > 0, search = 'best_of_n', or no reward"
            )
        return self


@dataclass
class State:
    """Of one run."""

    search: Search | None = None
    start: Tensor | None = None
    """The initial noise at the interpolant's first level, where that is not the pipeline's."""


class RBFSearch(Plugin):
    name = "rbf_search"
    paper = Paper(
        title="Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing",
        arxiv="2503.19385",
        implemented="SDE sampling of flow models on the linear and the VP interpolant; rollover budget forcing with any reward",
        omitted="gradients of a reward (the paper's DPS variant); SoP, SMC and CoDe, compared with there, which keep several states",
        licence="official scheduler non-commercial; written from the equations",
    )
    families = ("flux", "sd3", "qwen_image", "wan")
    Config = RBFSearchConfig
    State = State
    neutral: ClassVar[dict[str, Any]] = {"reward": None, "interpolant": "linear", "norm": 0.0, "grid": "pipeline"}
    active: ClassVar[dict[str, Any]] = {
        "reward": "diffgraft_rbf_search.rewards:compressibility",
        "max_nfe": 10,
        "particles": 2,
        **{"interpolant": "vp", "norm": 3.0, "grid": "exp"},
    }
    scheduler = VPFlowScheduler
    effects = Effects(
        replaces=frozenset({"scheduler"}),
        edits=frozenset({"schedule", "timestep", "latents"}),
        needs=frozenset({"all_blocks", "extra_forwards", "own_steps"}),
        stochastic=True,
    )
    needs = (Need("reward", "reward"),)
    config: RBFSearchConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.reward is None:  # the SDE alone takes one step after the other
            self.effects = replace(self.effects, needs=self.effects.needs - {"own_steps"})

    def check(self, target: Target) -> None:
        if self.config.reward is None:
            return
        name = type(target.pipe).__name__
        if "strength" in parameters(target.pipe):
            raise Unsupported(f"rbf_search: {name} starts from a picture, the search from noise: without a reward it samples there too")
        if len(target.denoisers) > 1:
            raise Unsupported(f"rbf_search: {name} has {len(target.denoisers)} denoisers, chosen by the pipeline's time, not a candidate's")
        if target.pipe.config.get("expand_timesteps"):
            raise Unsupported(f"rbf_search: {name} gives each token a time of its own (expand_timesteps); the search has one a sample")
        ensure_decodes(target.pipe, target.family)

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if self.is_neutral:
            return None
        options = {key: getattr(self.config, key) for key in ("grid", "norm", "diffusion", "beta_min", "beta_max")}
        if "flow_shift" in old.config:  # DPM-Solver and UniPC call it so
            options["shift"] = old.config["flow_shift"]
        cls = VPFlowScheduler if self.config.interpolant == "vp" else FlowSDEScheduler
        known = inspect.signature(cls).parameters
        return cls.from_config({key: value for key, value in {**old.config, **options}.items() if key in known})

    def run(self, call: RunCall, next: Any) -> Any:
        result = next(call)
        if (search := call.shared.search) is not None and search.x0 is not None:
            if call.stopped and not search.is_over:  # what the pipeline has is the next candidate: it decodes the best so far instead
                result = next(call.replace(latents=search.x0))
            call.note("reward of the result: " + ", ".join(f"{value:.4g}" if value > -math.inf else "not asked" for value in search.reward))
            if self.config.record:
                call.record(search.records())
        return result

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        schedule: Schedule = next(call)
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        if self.config.reward is None or call.stopped:
            return schedule
        knobs, n = self.config, len(schedule.timesteps)
        paths = knobs.search == "best_of_n"
        if n < 2 and not paths:
            raise ConfigError(
                f"plugin 'rbf_search': search = {knobs.search!r} chooses among children of a step, and there is none in a run of one: give "
                "num_inference_steps >= 2, or search = 'best_of_n'"
            )
        particles = 0 if paths else knobs.particles
        Q = quota(knobs.max_nfe, particles, n)
        if Q < 1:
            raise ConfigError(
                f"plugin 'rbf_search': max_nfe = {knobs.max_nfe}"
                + (f" with particles = {particles} leaves nothing for one of {n} steps" if particles else f" is no path of {n} steps")
                + f": give max_nfe >= {particles + n}, {'fewer particles, ' if particles else ''}or fewer steps"
            )
        assert schedule.sigmas is not None
        levels = [call.scheduler.path.at(call.scheduler.path.time(t)) for t in schedule.sigmas.tolist()]
        max_nfe = Q * n if paths else knobs.max_nfe  # no path is begun that cannot end
        call.shared.search = Search(levels, max_nfe, knobs.particles, Q, knobs.result, knobs.search)
        shown = nominal(max_nfe, knobs.particles, Q, n, knobs.search)
        return Schedule(schedule.timesteps[shown], schedule.sigmas[[*shown, n]])

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.is_neutral:
            return next(call)  # type: ignore[no-any-return]
        shared: State = call.shared
        search = shared.search
        if call.step.index == 0:
            if search is not None and not search.climbs:
                search.begin(captions(self.config.captions, call.run.arguments, len(call.latents)))
            level = search.levels[0] if search is not None else call.pipe.scheduler.levels[0]
            if level.c != 1 and "strength" not in call.run.arguments:  # x_t = x_r / c; a picture's are at the pipeline's scale already
                if shared.start is None:
                    shared.start = (call.latents.float() / level.c).to(call.latents.dtype)
                call = call.with_latents(shared.start)
        if search is not None:
            search.asked = call.step.index
            T = call.pipe.scheduler.config.num_train_timesteps
            t = torch.tensor([call.family.told(level.t * T) for level in search.places()])
            call = call.replace(**{call.family.timestep: t.repeat(len(call.branches)).to(call.timestep)})
        return next(call)  # type: ignore[no-any-return]

    def step(self, call: StepCall, next: Any) -> StepOutput:
        search: Search | None = call.shared.search
        if self.is_neutral:
            return next(call)  # type: ignore[no-any-return]
        if search is None:
            call.count("nfe")
            return next(call.replace(generator=call.generator))  # type: ignore[no-any-return]
        if search.asked != call.step.index:
            raise Unsupported(
                "rbf_search: a plugin further out answered the denoiser's call in its place, so the candidates' own times were not asked "
                "for: put rbf_search first in the list"
            )
        x, v = call.sample.float(), call.model_output.float()
        x0 = search.clean(x, v)
        rewards = self.rewards(call, x0.to(call.sample.dtype)) if search.is_judged else [-math.inf] * len(x)
        search.judge(x, v, x0, rewards)
        call.count("nfe")
        if search.is_over:
            assert search.x0 is not None
            if self.config.search == "best_of_n":
                call.count("paths", sum(climb.nfe // (climb.last + 2) for climb in search.climbs))
            call.count("accepted", sum(climb.accepted for climb in search.climbs))
            call.count("exhausted", sum(climb.exhausted for climb in search.climbs))
            return StepOutput(search.x0.to(call.sample.dtype), search.x0)
        return StepOutput(search.propose(call.noise(), call.scheduler).to(call.sample.dtype), x0)

    def rewards(self, call: StepCall, x0: Tensor) -> list[float]:
        """The rewards of the pictures that the candidates' x0 decode to."""
        images = decode(call.pipe, call.family, x0, call.run.arguments)
        try:
            return call.given("reward")(images, call.shared.search.captions)  # type: ignore[no-any-return]
        except RewardError as error:
            raise RewardError(f"rbf_search, evaluation {call.step.index + 1} of {call.shared.search.max_nfe}: {error}") from error
