"""SuperDiff: one picture from two prompts, or two models, by the Ito density estimator (Skreta, Atanackovic, Bose, Tong, Neklyudov,
arXiv 2412.17762).

Along the run the log-density of the sample under either prompt is followed at no cost. "or" leans to the prompt under which the sample is
more likely, "and" keeps both alike. Steps are those of an SDE in variance-exploding form: divide a sample x = a x0 + s eps by a, and it is
x0 + sigma eps with sigma = s / a. The ODE form ("and_ode", "avg_ode") takes the divergences by a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    DenoiseCall,
    Effects,
    GuideCall,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    StepCall,
    StepOutput,
    Unsupported,
)
from diffgraft.methods.conditioning import Conditioning, for_each_prompt, own_conditioning, with_prompt
from diffgraft.methods.gradients import LossScale, ensure_differentiable, latent_gradient, predict_alone
from diffgraft.methods.predictions import SignalNoise, known_kind, levels_next, levels_of, noise_estimate, prediction_kind
from diffgraft.methods.second import dtype_difference, unhooked
from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.utils.torch_utils import randn_tensor
from pydantic import Field
from torch import Tensor

from diffgraft_superdiff.method import Move, density_change, guided, kappa_and, kappa_or, mixture, ode, sde, to_clean

__all__ = ["SuperDiff"]
__version__ = "0.1.0"

Next = Callable[[DenoiseCall], Tensor]


class SuperDiffConfig(PluginConfig):
    """Knobs of SuperDiff."""

    prompt: str | tuple[str, ...] | None = Field(
        None, description="b: the second prompt, or one for each prompt of the call; the call's own prompt is a. none: off"
    )
    model: str | Path | DiffusionPipeline | ModularPipeline | None = Field(
        None, description="the model of b: a bundled name, folder, Hub id or live pipeline; none: the pipeline's own"
    )
    operation: Literal["or", "and", "average", "and_ode", "avg_ode"] = Field(
        "and", description="what the picture shows: either prompt, both, or their mean; and_ode, avg_ode: without noise, along the ODE"
    )
    temperature: float = Field(1.0, gt=0, description="T: how sharply 'or' chooses")
    bias: float = Field(0.0, description="l: 'or' counts log q_a + l")
    lift: float = Field(0.0, description="'and' and 'and_ode' let log q_a gain this much on log q_b in the whole run")
    official_or_sign: bool = Field(False, description="'or' with the official code's density, which has a wrong sign (for comparison)")


@dataclass
class Densities:
    """Followed in one run: log q of both [batch], and what the branches said at this step."""

    log_qa: Any = None
    log_qb: Any = None
    kappas: list[Tensor] = field(default_factory=list)
    heard: Conditioning | None = None
    scale: LossScale = field(default_factory=LossScale)
    vb: Any = None
    skipped: Any = None
    divergences: Any = None
    branches: dict[str, Tensor] = field(default_factory=dict)


class SuperDiff(Plugin):
    name = "superdiff"
    paper = Paper(
        title="The Superposition of Diffusion Models Using the Itô Density Estimator",
        arxiv="2412.17762",
        implemented="OR, AND and average of two prompts or two models with the Ito density estimator, as an SDE in sigma or as its ODE",
        omitted="more than two prompts",
        licence="official code MIT; written from the paper's equations",
    )
    families = ("sd", "sdxl", "sd3")
    Config = SuperDiffConfig
    State = Densities
    neutral: ClassVar[dict[str, Any]] = {"prompt": None}
    active: ClassVar[dict[str, Any]] = {"prompt": "a green dog on the right"}
    effects = Effects(
        edits=frozenset({"prediction", "latents"}),
        needs=frozenset({"extra_forwards", "all_blocks", "plain_gradients"}),
        stochastic=True,
    )
    needs = (Need("pipeline", "model"),)
    config: SuperDiffConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.operation != "and_ode":  # it alone takes gradients
            self.effects = replace(self.effects, needs=self.effects.needs - {"plain_gradients"})

    def run(self, call: RunCall, next: Any) -> Any:
        shared = call.shared
        shared.__init__()  # an outer plugin may run the pipeline several times
        if self.config.prompt is None:
            call.note("inactive: prompt is none, so there is no second prompt to put the call's together with; give prompt=...")
            return next(call)
        if getattr(call.pipe.scheduler, "order", 1) != 1:
            raise Unsupported(f"superdiff: {type(call.pipe.scheduler).__name__} makes a step in two stages; use DDIM or Euler")
        known_kind(call.family, call.pipe.scheduler)
        second = call.given("model") or call.pipe
        if (why := dtype_difference(call.pipe, second, call.family)) is not None:  # a quantised one does not follow the first one's
            raise Unsupported(f"superdiff: model = {type(second).__name__} does not fit: {why}")
        arguments = call.arguments()
        shared.heard = own_conditioning(second, with_prompt(arguments, for_each_prompt(self.name, self.config.prompt, arguments)))
        result = next(call)
        if shared.kappas:
            followed = {} if shared.log_qa is None else {"log_qa": shared.log_qa, "log_qb": shared.log_qb}
            call.record({**followed, "kappa": torch.stack(shared.kappas)})
            ends = {"log q_a": shared.log_qa, "log q_b": shared.log_qb, "kappa": shared.kappas[-1]}
            call.note("at the end " + "; ".join(f"{name} = {few(value)}" for name, value in ends.items() if value is not None))
        return result

    # the denoiser's calls -----------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Next) -> Tensor:
        if self.config.prompt is None:
            return next(call)
        shared = call.shared
        if call.step.call == 0 and self.config.operation == "and_ode":
            ensure_differentiable(call)
        if call.extra:  # skip-layer guidance asks for the conditional rows once more, with layers left out
            vb = self.second(call, shared.heard.put_into(call), next)
            shared.skipped = out = next(call), vb
            return out[0]
        if "cond" in call.branches:  # sequential guidance asks for each half by itself
            out = self.second(call, shared.heard.put_into(call), next)
            shared.vb = out.chunk(len(call.branches))[call.branches.index("cond")]
            if self.config.operation == "and_ode":
                shared.divergences = self.divergences(call)
        return next(call)

    def second(self, call: DenoiseCall, dressed: DenoiseCall, next: Next) -> Tensor:
        """What the model of b says to this call."""
        call.count("second prompt", len(call.branches))
        base = call.given("model")
        return next(dressed) if base is None else self.of_base(base, dressed)

    @staticmethod
    def of_base(base: Any, call: DenoiseCall) -> Tensor:
        """The second pipeline's denoiser, as it is."""
        with unhooked():
            return getattr(base, call.model_name)(**call.arguments())[0]  # type: ignore[no-any-return]

    def divergences(self, call: DenoiseCall) -> tuple[Tensor, Tensor]:
        """div v_a, div v_b [batch]: Hutchinson's estimate <e, grad <e, v>>, with one Rademacher e for both."""
        base, x = call.given("model"), call.latents
        e = randn_tensor(x.shape, generator=call.generator, device=x.device, dtype=torch.float32).sign()
        kind, here = prediction_kind(call.family, call.pipe.scheduler), with_signal(levels_of(call))
        alone = call.only("cond")
        dressed = call.shared.heard.put_into(alone, "cond")
        found = []
        for asked, model in ((alone, None), (dressed, base)):

            def along_e(z: Tensor, asked: DenoiseCall = asked, model: Any = model) -> Tensor:
                part = asked.with_input(z)
                said = predict_alone(part) if model is None else self.of_base(model, part)
                v = noise_estimate(z.float(), said.float(), SignalNoise(here.a.float(), here.s.float()), kind)
                return (v * e).flatten(1).sum(1)

            gradient = latent_gradient(call, along_e, scale=call.shared.scale).gradient
            found.append(here.a * (gradient.double() * e).flatten(1).sum(1))  # of x / a, in which the samples are held
        call.count("gradients", 2)
        return found[0], found[1]

    def guide(self, call: GuideCall, next: Any) -> Tensor:
        call.shared.branches = dict(call.branches)
        return next(call)  # type: ignore[no-any-return]

    # the step ---------------------------------------------------------------------------------------------------------------------

    def step(self, call: StepCall, next: Any) -> StepOutput:
        shared, config = call.shared, self.config
        out: StepOutput = next(call)  # the scheduler must count this step
        if config.prompt is None:
            return out
        if shared.vb is None:
            raise Unsupported("superdiff: a plugin further out answered this step's denoiser call in its place; put superdiff first")
        along_ode, ends = config.operation.endswith("_ode"), call.step.ends_schedule
        here, there = with_signal(levels_of(call)), with_signal(levels_next(call))
        sigma, x = here.s / here.a, call.sample.double() / here.a
        after = torch.zeros_like(sigma) if ends else there.s / there.a
        va, vb, ga, gb = self.predictions(call, here)
        move = ode(sigma, after) if along_ode else to_clean(sigma) if ends else sde(sigma, after)
        noise = torch.zeros((), device=x.device) if along_ode or ends else move.spread * call.noise().double()
        kappa = self.kappa(call, va, vb, ga, gb, noise, move)
        dx = move.drift * mixture(ga, gb, kappa) + noise
        shared.kappas.append(kappa)
        if config.operation == "and_ode" or not (along_ode or ends):  # at the clean sample there is no density
            self.follow(shared, va, vb, dx, move)
        shared.branches, shared.vb, shared.skipped, shared.divergences = {}, None, None, None
        x0 = x - sigma * mixture(ga, gb, kappa)
        return StepOutput(((x + dx) * (1.0 if ends else there.a)).to(out.sample.dtype), x0.to(out.sample.dtype))

    def predictions(self, call: StepCall, here: SignalNoise) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """v_a, v_b and what guidance makes of each, g_a, g_b, as noise."""
        shared, x, kind = call.shared, call.sample.double(), prediction_kind(call.family, call.scheduler)

        def as_noise(output: Tensor) -> Tensor:
            return noise_estimate(x, output.double(), here, kind)

        vb = as_noise(shared.vb)
        if not shared.branches:  # without guidance the pipeline's prediction is that of a, and v_0 has no say
            va = as_noise(call.model_output)
            return va, vb, va, vb
        v0, va = as_noise(shared.branches["uncond"]), as_noise(shared.branches["cond"])
        w = float(call.run.guidance_scale(call.family.denoisers[0]) or 1.0)
        ga, gb = guided(v0, va, w), guided(v0, vb, w)
        if shared.skipped is not None:
            k = float(call.pipe._skip_layer_guidance_scale)
            ga, gb = ga + k * (va - as_noise(shared.skipped[0])), gb + k * (vb - as_noise(shared.skipped[1]))
        return va, vb, ga, gb

    def kappa(self, call: StepCall, va: Tensor, vb: Tensor, ga: Tensor, gb: Tensor, noise: Tensor, move: Move) -> Tensor:
        """The weight of a in this step [batch]."""
        shared, config = call.shared, self.config
        if config.operation == "or":
            known = (shared.log_qa, shared.log_qb) if shared.kappas else (torch.zeros_like(half(va)),) * 2
            return kappa_or(*known, config.temperature, config.bias)
        if config.operation in ("and", "and_ode"):
            step = call.step
            clean = config.operation == "and" and step.behind == step.calls - 1 - step.call  # the last step is no step of the SDE
            gain = 0.0 if clean and step.ends_schedule else config.lift / max(step.total - clean, 1)
            return kappa_and(va, vb, ga, gb, noise, move, gain, shared.divergences or (0.0, 0.0))
        return half(va)

    def follow(self, shared: Densities, va: Tensor, vb: Tensor, dx: Tensor, move: Move) -> None:
        """Both log-densities after this step."""
        da, db = shared.divergences or (0.0, 0.0)
        sign = -1 if self.config.official_or_sign and self.config.operation == "or" else 1
        a, b = density_change(va, dx, move, da, sign), density_change(vb, dx, move, db, sign)
        shared.log_qa = a if shared.log_qa is None else shared.log_qa + a
        shared.log_qb = b if shared.log_qb is None else shared.log_qb + b


def few(values: Tensor) -> str:
    """The first numbers of [batch] in words."""
    return ", ".join(f"{value:.4g}" for value in values[:4].tolist()) + (", ..." if len(values) > 4 else "")


def half(x: Tensor) -> Tensor:
    """1/2 for each sample [batch]."""
    return torch.full((len(x),), 0.5, dtype=torch.float64, device=x.device)


def with_signal(levels: SignalNoise) -> SignalNoise:
    """Levels that x / a can be taken at: sigma = 1 of a flow model, where a is 0, is taken a little lower, at sigma / a = 1000."""
    return SignalNoise(levels.a.double().clamp(min=1e-3), levels.s.double())
