"""SDE sampling with a diffusion coefficient of one's choice, for flow and variance-preserving models
(Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797).

The pipeline's own scheduler makes its step; around it the score's pull and fresh noise are added in such a proportion that the marginals
stay. Every sample x = a x0 + s eps lies on the linear interpolant once it is divided by a + s, with sigma = s / (a + s): so one rule serves
all schedulers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import Effects, Paper, Plugin, PluginConfig, RunCall, Step, StepCall, StepOutput, Unsupported
from diffgraft.methods.predictions import SignalNoise, clean_estimate, known_kind, levels_after, levels_of, noise_estimate, prediction_kind
from pydantic import Field, NonNegativeInt, field_validator
from torch import Tensor

from diffgraft_interpolant_sde.method import Noise, diffusion, kick, log_prob

__all__ = ["InterpolantSDE"]
__version__ = "0.1.0"


class InterpolantSDEConfig(PluginConfig):
    """Knobs of the SDE."""

    eta: float = Field(0.7, ge=0, description="strength of the noise; 0 is the ODE, bit for bit")
    noise: Noise = Field("flow_grpo", description="2 epsilon(sigma): eta^2 sigma / (1 - sigma), eta^2 (const), or eta^2 sigma (sigma)")
    noise_window: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        None, description="steps i0 <= i < i1 that get noise; the others are the ODE's"
    )
    last_step_ode: bool = Field(True, description="no noise in the schedule's last step: it would stay in the picture")
    record: bool = Field(False, description="keep log-probabilities, means and standard deviations of the steps in the report")

    @field_validator("noise_window")
    @classmethod
    def _rises(cls, window: tuple[int, int] | None) -> tuple[int, int] | None:
        if window is not None and window[0] > window[1]:
            raise ValueError(f"the steps i0 <= i < i1 of {window} are none; did you mean {window[::-1]}?")
        return window


RECORDED = ("log_prob", "log_prob_mean", "mean", "std", "sample")


@dataclass
class Path:
    """Kept in one run where asked for: what the noisy steps did."""

    noisy: bool = False
    """Whether noise has come in."""
    total: int = 0
    """Steps of the run."""
    start: tuple[SignalNoise, Tensor] | None = None
    """Level and noise estimate where a step of several calls began (PLMS, whose last call starts over from there)."""
    log_prob: list[Tensor] = field(default_factory=list)
    log_prob_mean: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    std: list[Tensor] = field(default_factory=list)
    sample: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


class InterpolantSDE(Plugin):
    name = "interpolant_sde"
    paper = Paper(
        title="Stochastic Interpolants: A Unifying Framework for Flows and Diffusions",
        arxiv="2303.08797",
        implemented="SDE steps with any epsilon(sigma) around the pipeline's own scheduler, with log-probabilities of the steps",
        omitted="training objectives of general interpolants; the Heun variant, which needs two denoiser calls a step",
        licence="written from the equations",
    )
    families = ("*",)
    Config = InterpolantSDEConfig
    State = Path
    neutral: ClassVar[dict[str, Any]] = {"eta": 0.0}
    active: ClassVar[dict[str, Any]] = {"eta": 0.7}
    effects = Effects(edits=frozenset({"latents"}), stochastic=True)
    config: InterpolantSDEConfig

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.eta and getattr(call.pipe.scheduler, "order", 1) != 1:
            raise Unsupported(
                f"interpolant_sde: {type(call.pipe.scheduler).__name__} makes a step in two stages, between which no noise may come; "
                "use a first-order scheduler (DDIM, Euler, FlowMatchEuler)"
            )
        if self.config.eta:
            known_kind(call.family, call.pipe.scheduler)
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        result = next(call)
        kept: Path = call.shared
        if kept.total and not kept.noisy and not call.stopped:
            call.note(f"inactive: {self.why_no_noise(kept.total)}, so the run is the ODE's")
        if kept.steps:
            tensors = {name: torch.stack(getattr(kept, name)) for name in RECORDED}
            call.record({"steps": torch.tensor(kept.steps), **tensors})
        return result

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        kept: Path = call.state  # the run's; of a sound, which is stepped beside the picture, its own
        kept.total = call.step.total
        noisy = self.is_noisy(call.step)
        own = kept.noisy and goes_back(call.scheduler)
        if not noisy and not own:
            return out
        here, there = levels_of(call), levels_after(call)
        x, output, kind = call.sample.float(), call.model_output.float(), prediction_kind(call.family, call.scheduler)
        eps, mean = noise_estimate(x, output, here, kind), out.sample.float()
        if call.step.stages > 1:
            kept.start = (here, eps) if call.step.stage == 0 or kept.start is None else kept.start
            if not (call.step.ends_step or call.step.is_last):
                return out
            (here, eps), kept.start = kept.start, None
        if own:
            name = type(call.scheduler).__name__
            call.note(f"{name} goes back to samples from before the noise, so the steps after it are first-order ones")
            mean = there.a * clean_estimate(x, output, here, kind) + there.s * eps
        if not noisy:
            return StepOutput(mean.to(out.sample.dtype), out.x0)
        scale = there.a + there.s
        sigma, after = here.s / (here.a + here.s), there.s / scale
        shift, std = kick(eps, sigma, diffusion(sigma, after, self.config.noise, self.config.eta), sigma - after)
        mean, std = mean + scale * shift, scale * std
        sample = mean + std * call.noise()
        kept.noisy = True
        call.count("noisy")
        if self.config.record:
            kept.steps.append(call.step.index)
            odds = log_prob(sample, mean, std), log_prob(sample, mean, std, over="mean")
            for name, value in zip(RECORDED, (*odds, mean, std, sample), strict=True):
                getattr(kept, name).append(value)
        return StepOutput(sample.to(out.sample.dtype), out.x0)

    def is_noisy(self, step: Step) -> bool:
        """Whether this step gets noise."""
        first, end = self.config.noise_window or (0, step.total)
        return self.config.eta > 0 and first <= step.index < end and not (step.ends_schedule and self.config.last_step_ode)

    def why_no_noise(self, total: int) -> str:
        """In words, of a run of ``total`` steps."""
        window = self.config.noise_window
        if self.config.eta == 0:
            return "eta is 0"
        if window is None or window[0] < min(window[1], total):
            return f"the only one of the run's {total} steps that was to have noise is the schedule's last, which last_step_ode spares"
        return f"none of the run's {total} steps (0 to {total - 1}) lies in noise_window = {window}"


def goes_back(scheduler: Any) -> bool:
    """Whether a step may start over from the sample before the last one: a corrector, which would take the noise out again (UniPC)."""
    return hasattr(scheduler, "last_sample")
