"""SuperDiff: one picture from two prompts, or two models, by the Ito density estimator (Skreta, Atanackovic, Bose, Tong, Neklyudov,
arXiv 2412.17762).

Along the run the log-density of the sample under either prompt is followed at no cost. "or" leans to the prompt under which the sample is
more likely, "and" keeps both alike. Steps are those of an SDE in variance-exploding form: divide a sample x = a x0 + s eps by a, and it is
x0 + sigma eps with sigma = s / a.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    ConfigError,
    DenoiseCall,
    Effects,
    GuideCall,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    Step,
    StepCall,
    StepOutput,
    Unsupported,
)
from diffgraft.methods.conditioning import Conditioning, own_conditioning
from diffgraft.methods.predictions import SignalNoise, levels_at, noise_estimate, prediction_kind
from diffusers import DiffusionPipeline
from pydantic import Field
from torch import Tensor

from diffgraft_superdiff.method import density_change, kappa_and, kappa_or, mixture

__all__ = ["SuperDiff"]
__version__ = "0.1.0"


class SuperDiffConfig(PluginConfig):
    """Knobs of SuperDiff."""

    prompt: str | tuple[str, ...] | None = Field(
        None, description="b: the second prompt, or one for each prompt of the call; the call's own prompt is a. none: off"
    )
    model: str | Path | DiffusionPipeline | None = Field(
        None, description="the model of b: a bundled name, folder, Hub id or live pipeline; none: the pipeline's own"
    )
    operation: Literal["or", "and", "average"] = Field("and", description="what the picture shows: either prompt, both, or their mean")
    temperature: float = Field(1.0, gt=0, description="T: how sharply 'or' chooses")
    bias: float = Field(0.0, description="l: 'or' counts log q_a + l")
    lift: float = Field(0.0, description="'and' lets log q_a gain this much on log q_b in each step, divided by T")
    official_or_sign: bool = Field(False, description="'or' with the official code's density, which has a wrong sign (for comparison)")


@dataclass
class Densities:
    """Followed in one run: log q of both [batch], and what the branches said at this step."""

    log_qa: Any = None
    log_qb: Any = None
    kappas: list[Tensor] = field(default_factory=list)
    heard: Conditioning | None = None
    vb: Any = None
    branches: dict[str, Tensor] = field(default_factory=dict)


class SuperDiff(Plugin):
    name = "superdiff"
    paper = Paper(
        title="The Superposition of Diffusion Models Using the Itô Density Estimator",
        arxiv="2412.17762",
        implemented="OR, AND and average of two prompts or two models, with the Ito density estimator, as an SDE in sigma space",
        omitted="the ODE form, which needs Hutchinson divergences; more than two prompts",
        licence="official code MIT; written from the paper's equations",
    )
    families = ("sd", "sdxl", "sd3")
    Config = SuperDiffConfig
    State = Densities
    neutral: ClassVar[dict[str, Any]] = {"prompt": None}
    active: ClassVar[dict[str, Any]] = {"prompt": "a green dog on the right"}
    effects = Effects(
        edits=frozenset({"prediction", "latents"}), needs=frozenset({"extra_forwards", "all_blocks"}), stochastic=True
    )
    needs = (Need("pipeline", "model"),)
    config: SuperDiffConfig

    def run(self, call: RunCall, next: Any) -> Any:
        shared = call.shared
        shared.__init__()  # an outer plugin may run the pipeline several times
        if self.config.prompt is None:
            return next(call)
        if call.extras:
            raise Unsupported(
                f"superdiff: this call asks for a further prediction ({', '.join(call.extras)}), which the mixture of two prompts has no "
                "place for: leave skip_guidance_layers out"
            )
        if getattr(call.pipe.scheduler, "order", 1) != 1:
            raise Unsupported(f"superdiff: {type(call.pipe.scheduler).__name__} makes a step in two stages; use DDIM or Euler")
        second = call.given("model") or call.pipe
        shared.heard = own_conditioning(second, {**call.arguments(), "prompt": self.second_prompt(call.get("prompt"))})
        result = next(call)
        if shared.kappas:  # a run of one step goes straight to the clean sample
            call.record({"log_qa": shared.log_qa, "log_qb": shared.log_qb, "kappa": torch.stack(shared.kappas)})
        return result

    def second_prompt(self, first: Any) -> Any:
        """b, in the form of the call's own prompt."""
        second = self.config.prompt
        count = len(first) if isinstance(first, list) else 1
        if isinstance(second, tuple) and len(second) != count:
            raise ConfigError(f"plugin 'superdiff': prompt has {len(second)} texts for a call with {count} prompts; give one for each")
        texts = list(second) if isinstance(second, tuple) else [second] * count
        return texts if isinstance(first, list) else texts[0]

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.prompt is None:
            return next(call)  # type: ignore[no-any-return]
        if "cond" in call.branches:
            base, dressed = call.given("model"), call.shared.heard.put_into(call)
            out = next(dressed) if base is None else getattr(base, call.model_name)(**dressed.arguments())[0]
            call.shared.vb = out.chunk(len(call.branches))[call.branches.index("cond")]
            call.count("second prompt", len(call.branches))
        return next(call)  # type: ignore[no-any-return]

    def guide(self, call: GuideCall, next: Any) -> Tensor:
        call.shared.branches = dict(call.branches)
        return next(call)  # type: ignore[no-any-return]

    def step(self, call: StepCall, next: Any) -> StepOutput:
        shared, config = call.shared, self.config
        out: StepOutput = next(call)  # the scheduler must count this step
        if config.prompt is None:
            return out
        if shared.vb is None:
            raise Unsupported("superdiff: a plugin further out answered this step's denoiser call in its place; put superdiff first")
        here = self.levels(call, call.step)
        sigma, x = here.s / here.a, call.sample.double() / here.a
        kind = prediction_kind(call.family, call.scheduler)
        # without guidance the pipeline's prediction is that of a, w = 1, and v_0 has no say
        branches, w = (shared.branches, self.scale(call)) if shared.branches else ({"cond": call.model_output, "uncond": shared.vb}, 1.0)
        outputs = (branches["uncond"], branches["cond"], shared.vb)
        v0, va, vb = (noise_estimate(call.sample.double(), v.double(), here, kind) for v in outputs)
        if shared.log_qa is None:
            shared.log_qa = shared.log_qb = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if call.step.is_last:  # straight to the clean sample
            kappa = shared.kappas[-1] if shared.kappas else torch.full_like(shared.log_qa, 0.5)
            return StepOutput((x - sigma * mixture(v0, va, vb, kappa, w)).to(out.sample.dtype), out.x0)
        there = self.levels(call, call.step_at(1))
        d_sigma = there.s / there.a - sigma
        noise = (2 * d_sigma.abs() * sigma).sqrt() * call.noise().double()
        if config.operation == "and":
            kappa = kappa_and(v0, va, vb, noise, sigma, d_sigma, w, config.lift, config.temperature)
        elif config.operation == "or":
            kappa = kappa_or(shared.log_qa, shared.log_qb, config.temperature, config.bias)
        else:
            kappa = torch.full_like(shared.log_qa, 0.5)
        dx = 2 * d_sigma * mixture(v0, va, vb, kappa, w) + noise
        flip = -1 if config.official_or_sign and config.operation == "or" else 1
        shared.log_qa = shared.log_qa + density_change(va, dx, sigma, d_sigma, flip)
        shared.log_qb = shared.log_qb + density_change(vb, dx, sigma, d_sigma, flip)
        shared.kappas.append(kappa)
        shared.branches, shared.vb = {}, None
        return StepOutput(((x + dx) * there.a).to(out.sample.dtype), out.x0)

    def scale(self, call: StepCall) -> float:
        """The guidance scale of this run."""
        return float(call.run.guidance_scale(call.family.denoisers[0]) or 1.0)

    @staticmethod
    def levels(call: StepCall, step: Step) -> SignalNoise:
        """Signal and noise of the pipeline's latents at a step; sigma = 1 of a flow model, where a is 0, is taken a little lower."""
        a, s = levels_at(call.family, call.scheduler, step.t, step.sigma, call.sample.device)
        return SignalNoise(a.double().clamp(min=1e-3), s.double())
