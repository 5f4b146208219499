"""Observation self-guidance: a pipeline is led to what was measured, by the gradient of the misfit through its own denoiser (TSDiff:
Kollovieh, Ansari, Bohlke-Schneider, Zschiegner, Wang, Wang, arXiv 2307.11494).

At each step the denoiser says what the clean picture will be; that is measured as y was, and the step is led down the gradient of what is
missing. The method is one of time series, of which some values are known; here it is a picture and any operator.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    ConfigError,
    DenoiseCall,
    Effects,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
    root_of,
)
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.gradients import LossScale, checkpointed, ensure_differentiable, predict_alone, vjp_of
from diffgraft.methods.measurements import Mask
from diffgraft.methods.predictions import (
    SignalNoise,
    clean_estimate,
    is_exploding,
    is_flow,
    known_kind,
    levels_after,
    levels_at,
    levels_of,
    prediction_kind,
)
from diffgraft.methods.problems import Problem, ProblemKnob
from diffgraft.methods.restoring import begins_with_its_own, ensure_one_call_a_step, first_guess, pixels_of, problem_of
from pydantic import Field
from torch import Tensor

from diffgraft_observation_guidance.method import Loss, after_step, energy, eps_shift, is_told, output_shift, pinball, quantiles, squared

__all__ = ["ObservationGuidance"]
__version__ = "0.1.0"


class UnitScale(LossScale):
    """Of a loss whose gradient is of the size of the picture's own errors: it needs no more than room above."""

    START = 1.0


class ObservationGuidanceConfig(PluginConfig):
    """Knobs of observation_guidance."""

    problem: ProblemKnob = Field(
        None, description="y = A(x) + noise: a Problem, or a dict of operator, y and noise; none: off, bit for bit"
    )
    scale: float = Field(
        2.0, ge=0, le=1e6, description="s: how much the gradient counts, of the mean loss of a seen element times the elements of x; 0: off"
    )
    loss: Loss = Field("squared", description="what is missing: its square (a Gaussian's), or pinball: quantile k / (K + 1) for picture k")
    quantiles: int | None = Field(
        None, ge=1, le=1024, description="K: pictures of one measurement, one after the other; none: num_images_per_prompt, else as "
        "many as share a y"
    )  # fmt: skip
    form: Literal["ddim", "ddpm"] = Field(
        "ddim", description="where the gradient enters: in eps, before the step, or in the sample after it, times the posterior's variance"
    )
    noisiest: float = Field(
        13.0, gt=0, le=1e4, description="noise over signal above which a step is not led (13: the noisiest level of the paper's models)"
    )
    space: Literal["pixels", "latents"] = Field(
        "pixels", description="of latent models: what is compared, decoded pixels, or (of masks alone) latents, without the decoder"
    )
    checkpointing: bool = Field(False, description="less memory and more time: blocks are computed again for their gradient")


@dataclass
class Observed:
    """Of one run: what was measured, where, and what is known of this step."""

    problem: Problem | None = None
    y: Tensor | None = None
    """The measurement; in latent space its latents."""
    seen: Tensor | None = None
    """1 where ``y`` says something [1 or n, ...]; None where it says nothing at all."""
    q: Tensor | None = None
    led: list[bool] = field(default_factory=list)
    """For each call of ``scheduler.step``, whether it is."""
    asked: DenoiseCall | None = None
    """This step's call of the denoiser."""
    gradient: Tensor | None = None
    energies: list[Tensor] = field(default_factory=list)
    result: Tensor | None = None
    scale: LossScale = field(default_factory=UnitScale)


class ObservationGuidance(Plugin):
    name = "observation_guidance"
    paper = Paper(
        title="Predict, Refine, Synthesize: Self-Guiding Diffusion Models for Probabilistic Time Series Forecasting",
        arxiv="2307.11494",
        implemented="observation self-guidance with the squared and the quantile loss, in DDIM's and in DDPM's form, for pictures under "
        "any operator",
        omitted="refinement of another model's forecast (Langevin steps at one noise level), and time series",
        licence="official code Apache-2.0; written from the formulas",
    )
    families = ("pixel", "sd", "sdxl", "sd3", "dit", "pixart")
    not_on: ClassVar[dict[str, str]] = {k: v for k, v in begins_with_its_own("observation_guidance").items() if k == "*Inpaint*"}
    Config = ObservationGuidanceConfig
    State = Observed
    neutral: ClassVar[dict[str, Any]] = {"problem": None}
    active: ClassVar[dict[str, Any]] = {"scale": 1.0}
    effects = Effects(
        edits=frozenset({"prediction", "latents"}), needs=frozenset({"plain_gradients", "extra_forwards", "one_size"}), couples_batch=True
    )
    needs = (Need("problem", "problem"),)
    config: ObservationGuidanceConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        edits = {"prediction"} if self.config.form == "ddim" else {"latents"}
        self.effects = replace(self.effects, edits=frozenset(edits), couples_batch=self.config.loss == "pinball")

    @property
    def _off(self) -> bool:
        return self.config.problem is None or self.config.scale == 0

    def check(self, target: Target) -> None:
        if self._off:
            return
        ensure_decodes(target.pipe, target.family)
        self._ensure_fits(target.family, target.pipe.scheduler)

    def _ensure_fits(self, family: Any, scheduler: Any) -> None:
        known_kind(family, scheduler, self.name)
        if self.config.form == "ddpm" and (is_exploding(scheduler) or is_flow(family, scheduler)):
            raise Unsupported(
                f"{self.name}: form = 'ddpm' is of variance-preserving samples, and those of {type(scheduler).__name__} are not: take "
                "form='ddim', or a DDPM, DDIM or DPM++ scheduler"
            )

    # a run ---------------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Any) -> Any:
        if self._off:
            return next(call)
        ensure_one_call_a_step(self.name, call.family, call.pipe.scheduler)
        self._ensure_fits(call.family, call.pipe.scheduler)
        operator = call.given("problem").operator
        if self.config.space == "latents" and not isinstance(operator, Mask):
            raise ConfigError(f"{self.name}: space = 'latents' is for masks, and the operator is {type(operator).__name__}: take 'pixels'")
        observed: Observed = call.shared
        observed.__init__()  # an outer plugin may run the pipeline several times
        result = next(call)
        if observed.energies:
            call.record({"energy": torch.stack(observed.energies)})
        if observed.result is not None and observed.problem is not None:
            with torch.no_grad():
                call.record({"residual": observed.problem.residual(pixels_of(call, observed.result))})
        return result

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self._off or call.extra:
            return next(call)  # type: ignore[no-any-return]
        observed: Observed = call.shared
        if observed.problem is None:
            self._begin(call, observed)
        if observed.seen is None or not observed.led[call.step.call]:
            return next(call)  # type: ignore[no-any-return]
        observed.asked = call.replace()  # its own: what goes on to `next` belongs to the onion
        if self.config.form == "ddim":
            observed.gradient = self._gradient(call, call.latents)
        return next(call)  # type: ignore[no-any-return]

    def _begin(self, call: DenoiseCall, observed: Observed) -> None:
        """What is compared with what, and which elements of it were seen."""
        ensure_differentiable(call)  # a flow's first steps are not led
        problem = observed.problem = problem_of(call, self.name)
        n, like = len(call.latents), torch.zeros(problem.shape, device=call.latents.device)
        first_guess(call, problem, self.name, like)  # refuses another size than the run's
        observed.y, operator = problem.y, problem.operator
        seen = torch.ones_like(problem.y)
        if operator.linear:  # what is never anything else than 0 was not seen
            irregular = (
                torch.arange(1, like.numel() + 1, dtype=torch.float64).square().sin().view(problem.shape).to(like.device, torch.float32)
            )
            seen = (operator.A(irregular) != 0).float()
        if self.config.space == "latents":
            observed.y = first_guess(call, problem, self.name, problem.y)
            seen = seen.amin(1, keepdim=True)
            whole = -torch.nn.functional.adaptive_max_pool2d(-seen, list(observed.y.shape[-2:]))  # all pixels under it
            if bool(seen.any()) and not bool(whole.any()):  # check: allow host_sync because it is once a run
                raise ConfigError(f"{self.name}: space = 'latents': the mask sees no latent's pixels all: take space='pixels'")
            seen = whole
        if self.config.loss == "pinball":
            K = self.config.quantiles or call.run.arguments.get("num_images_per_prompt") or n // len(problem.y)
            if n % K:
                raise ConfigError(f"{self.name}: quantiles = {K}: the run makes {n} pictures, which are no {K} for each measurement")
            observed.q = quantiles(n, K).to(like)
        observed.seen = seen if bool(seen.any()) else None  # check: allow host_sync because it is once a run
        levels = [
            levels_at(call.family, call.pipe.scheduler, at.t, at.sigma, like.device) for at in map(call.step_at, range(call.step.calls))
        ]
        led = torch.stack([is_told(each, self.config.noisiest) for each in levels])
        observed.led = led.tolist()  # check: allow host_sync because it is once a run
        if observed.seen is None:
            call.note("inactive: the operator sees nothing of the picture")
        elif not any(observed.led):
            call.note(f"inactive: every step is noisier than noisiest = {self.config.noisiest:g}")

    def _gradient(self, call: DenoiseCall, x: Tensor) -> Tensor:
        """grad_x E [n, ...] in float32 at ``x``, for the time of ``call``."""
        observed: Observed = call.shared
        levels, guidance = levels_of(call), call.run.guidance_scale(call.model_name)
        kind = prediction_kind(call.family, call.pipe.scheduler)

        def energies(z: Tensor) -> Tensor:
            rows = predict_alone(call.with_input(z))[:, : z.shape[1]].float()  # without a learned variance
            said = dict(zip(call.branches, rows.chunk(len(call.branches)), strict=True))
            output = said["uncond"] + guidance * (said["cond"] - said["uncond"]) if "uncond" in said else said["cond"]
            E = self._energy(call, observed, clean_estimate(z, output, levels, kind))
            observed.energies.append(E.detach())
            return E

        half = call.sample.dtype == torch.float16
        u = torch.ones(len(x), device=x.device) * (observed.scale.on(x.device) if half else 1.0)
        with checkpointed(root_of(call.model), call.run) if self.config.checkpointing else nullcontext():
            gradient = vjp_of(call, energies, x.float(), u)
        call.count("gradient passes")
        return observed.scale.undone(gradient) if half else gradient

    def _energy(self, call: DenoiseCall, observed: Observed, x0: Tensor) -> Tensor:
        """E [n] of what the denoiser says of the clean samples."""
        assert observed.problem is not None
        assert observed.y is not None
        assert observed.seen is not None
        measured = x0 if self.config.space == "latents" else observed.problem.operator.A(pixels_of(call, x0))
        losses = squared(measured, observed.y) if observed.q is None else pinball(measured, observed.y, observed.q)
        return energy(losses, observed.seen, x0[0].numel())

    def step(self, call: StepCall, next: Any) -> StepOutput:
        observed: Observed = call.shared
        asked, observed.asked = observed.asked, None
        if asked is None:
            return next(call)  # type: ignore[no-any-return]
        levels, after = levels_of(call), levels_after(call)
        n = len(call.sample) // (2 if call.family.guidance.doubled and len(asked.branches) > 1 else 1)
        if observed.gradient is not None:
            out = next(self._led(call, observed.gradient, levels))
            observed.gradient = None
        elif call.step.ends_schedule and not bool(after.s > 0):  # check: allow host_sync because it is once a run
            out = next(call)  # to the clean sample: the posterior has no variance, and no gradient counts
        else:
            out = next(call)
            shift = after_step(self._gradient(asked, out.sample[:n]), levels, after, self.config.scale)
            out = StepOutput((out.sample.float() + copies(shift, out.sample)).to(out.sample.dtype), out.x0)
        if call.step.ends_schedule:
            observed.result = out.sample[:n].float()
        return out

    def _led(self, call: StepCall, gradient: Tensor, levels: SignalNoise) -> StepCall:
        """The step of eps + scale s grad E."""
        kind, output = prediction_kind(call.family, call.scheduler), call.model_output
        shift = output_shift(eps_shift(gradient, levels.s, self.config.scale), levels, kind)
        changes: dict[str, Any] = {"model_output": (output.float() + copies(shift, output)).to(output.dtype)}
        if "use_clipped_model_output" in call.names:  # DDIM's: where x0 is clipped, so that eps and x0 still make x
            changes["use_clipped_model_output"] = True
        return call.replace(**changes)  # type: ignore[no-any-return]


def copies(x: Tensor, like: Tensor) -> Tensor:
    """Again for each guidance branch, where the pipeline steps them all."""
    return x if len(x) == len(like) else torch.cat([x] * (len(like) // len(x)))
