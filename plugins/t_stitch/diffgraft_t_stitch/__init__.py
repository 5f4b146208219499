"""T-Stitch: early steps decide the layout, which a small model does as well, so it runs them and the large one the rest.

(Pan, Zhuang, Huang, Nie, Yu, Xiao, Cai, Anandkumar, arXiv 2402.14167.) Different diffusion models trained on the same data share the
sampling trajectory's latent space, so one may take over from another between two steps.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffgraft import Call, ConfigError, ControlCall, DenoiseCall, Effects, Family, Need, Paper, Plugin, PluginConfig, RunCall, Target
from diffgraft.methods.conditioning import Conditioning, PromptWatch
from diffgraft.methods.conditioning import ask as asked
from diffgraft.methods.second import unhooked
from diffusers import DiffusionPipeline, ModularPipeline
from pydantic import Field, field_validator
from torch import Tensor

from diffgraft_t_stitch.method import ends_by_begin, ends_by_steps, ends_by_time, model_at
from diffgraft_t_stitch.partner import ask, conditions, denoiser_of, ensure_fits, fitted, needs_own

__all__ = ["TStitch"]
__version__ = "0.1.0"


class TStitchConfig(PluginConfig):
    """Knobs of T-Stitch."""

    model: Any = Field(
        None,
        description="the small model: a bundled name, a folder, a Hub id or a live pipeline of the same latent space; a list for several, "
        "smallest first",
    )
    fraction: tuple[float, ...] = Field(
        (0.4,),
        description="r: share of the steps, from the first on, that the small model runs, 0 to 1; one share a model, together at most 1; "
        "0 is off, 1 is the small model alone",
    )
    rule: Literal["steps", "begin", "time"] = Field(
        "steps",
        description="which steps make up a share. steps: (i + 1) / T <= r (paper; code for SD and SDXL); begin: i / T <= r (code for LCM); "
        "time: timestep / 1000 >= 1 - r (code for DiT)",
    )

    @field_validator("model")
    @classmethod
    def _named_or_live(cls, value: Any) -> Any:
        models = list(value) if isinstance(value, (list, tuple)) else [value]
        kinds = (str, os.PathLike, DiffusionPipeline, ModularPipeline)
        if value is not None and not (models and all(isinstance(model, kinds) for model in models)):
            raise ValueError("give a bundled name, a folder, a Hub id or a live diffusers pipeline, or a list of these")
        return value

    @field_validator("fraction", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) else value

    @field_validator("fraction")
    @classmethod
    def _shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not min(value) >= 0 or not sum(value) <= 1 + 1e-9:  # refuses nan too
            raise ValueError("shares of the steps: each 0 to 1, together at most 1")
        return value


@dataclass
class Trajectory:
    """In one run: where each small model's part ends, and what its own encoders made of the prompt (nothing: the large one's serve)."""

    total: int = -1
    ends: tuple[int, ...] = ()
    own: dict[int, Conditioning] = field(default_factory=dict)
    joined: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = field(default_factory=dict)
    watch: PromptWatch = field(default_factory=PromptWatch)

    def of(self, number: int, branches: tuple[str, ...], family: Family) -> dict[str, Any] | None:
        """Denoiser arguments of small model ``number``, put together once for all its steps."""
        if number not in self.own:
            return None
        key = number, branches
        if key not in self.joined:
            self.joined[key] = conditions(self.own[number], branches, family)
        return self.joined[key]


class TStitch(Plugin):
    name = "t_stitch"
    paper = Paper(
        title="T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching",
        arxiv="2402.14167",
        implemented="the first share of the steps by one or several smaller models of the same latent space, the rest by the large one",
        omitted="the search over shares of several models (its result is `fraction`); the checkpoints; fine-tuning at the stitch",
        licence="official code CC-BY-NC; written from the paper",
    )
    families = ("*",)
    Config = TStitchConfig
    State = Trajectory
    neutral = {"fraction": 0.0}  # noqa: RUF012
    active = {"fraction": 0.34}  # noqa: RUF012  # one step of three or four: what is put on the large model still shows
    sessions = True
    effects = Effects(replaces=frozenset({"denoiser"}))
    needs = (Need("pipeline", "model"),)
    tune = {"fraction": (0.1, 0.2, 0.3, 0.4, 0.6)}  # noqa: RUF012
    config: TStitchConfig

    def check(self, target: Target) -> None:
        smalls, r = as_list(target.given["model"]), self.config.fraction
        if not smalls and any(r):
            raise ConfigError(
                f"plugin 't_stitch': model = None with fraction = {r}: name the small model ('owner/name', a folder, a live pipeline)"
            )
        if smalls and len(smalls) != len(r):
            raise ConfigError(f"plugin 't_stitch': fraction = {r} has {len(r)} shares for {len(smalls)} models; give one share a model")
        for small in smalls:
            ensure_fits(target.pipe, target.family, small)

    def run(self, call: RunCall, next: Any) -> Any:
        shared: Trajectory = call.shared
        shared.total = -1
        shared.own.clear()
        shared.joined.clear()
        shared.watch = PromptWatch()
        for number, small in enumerate(as_list(call.given("model"))):
            if self.config.fraction[number] == 0:
                continue
            ensure_fits(call.pipe, call.family, small)  # an adapter or another dtype may have come after attaching
            if needs_own(call.pipe, small, call.family):
                shared.own[number] = ask(small, call.pipe, call.arguments(), call.family)
        result = next(call)
        if shared.watch.changed:
            call.note(
                "a callback changed the prompt in mid-run: the small model has encoders of its own, which cannot read embeddings of the "
                "large one's, so it kept the prompt of the call"
            )
        return result

    def control(self, call: ControlCall, next: Any) -> Any:
        """In the small model's steps its own ControlNet runs, where it has one; else the large one's, whose residuals fit it."""
        number = self.model_now(call)
        smalls = as_list(call.given("model"))
        network = getattr(smalls[number], "controlnet", None) if number < len(smalls) else None
        if network is None or network is call.model:
            return next(call)
        own = call.shared.of(number, ("cond",), call.family)
        text = call.family.conditioning[0]
        if own is not None and len(own[text]) < len(call[text]):  # not so in guess mode
            own = call.shared.of(number, call.family.guidance.order, call.family)
        with unhooked():
            return network(**fitted(call, network, own).arguments())

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        number = self.model_now(call)
        smalls = as_list(call.given("model"))
        if number == len(smalls):
            call.count("large")
            return next(call)  # type: ignore[no-any-return]
        call.count("small" if len(smalls) == 1 else f"small {number + 1}")
        model = denoiser_of(smalls[number], call.model_name, call.family)
        if number in call.shared.own:
            call.shared.watch.see(call)
        call = fitted(call, model, call.shared.of(number, call.texts, call.family))
        if call.extra and (layers := call.get("skip_layers")):
            call.note(f"skip-layer guidance left out layers {layers} of the small model in its steps, counted as the large one's are")
        if model is call.model:  # stitched with itself
            return next(call)  # type: ignore[no-any-return]
        with unhooked():  # blocks that both models share serve the small one here: no hook of the large one may see them
            return asked(call.family, model, call.arguments())

    def model_now(self, call: Call) -> int:
        """Number of the model that runs this step; all denoiser calls of a solver's step go to the same one."""
        if not any(self.config.fraction):
            return len(as_list(call.given("model")))
        step, shared = call.step, call.shared
        if step.call == 0 or shared.total != step.total:
            shared.total, shared.ends = step.total, self.ends(call)
        return model_at(step.index, shared.ends)

    def ends(self, call: Call) -> tuple[int, ...]:
        """How many of the solver's steps are over when each small model's part ends."""
        r, T = self.config.fraction, call.step.total
        if self.config.rule == "steps":
            return ends_by_steps(r, T)
        if self.config.rule == "begin":
            return ends_by_begin(r, T)
        t = torch.stack([torch.as_tensor(call.start_of(k).t) for k in range(T)])
        times = t.tolist()  # check: allow host_sync because it is read once a run, and by this one rule
        return ends_by_time(r, times, call.pipe.scheduler.config.num_train_timesteps)


def as_list(given: Any) -> Sequence[Any]:
    """The small pipelines, smallest first."""
    return () if given is None else given if isinstance(given, list) else [given]
