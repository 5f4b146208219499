"""Black-Scholes prompt mixing: at every step, the prompt that the picture in the making shows less (Kothandaraman, Lin, Manocha,
arXiv 2405.13685).

One denoiser call a step, as without the plugin, with one of two prompts. After each step the clean picture that it points to is decoded
and a scorer says how well it shows either prompt. These are the spot prices of two assets; the prompt whose call option is cheaper is
denoised with next.
"""

from __future__ import annotations

from collections.abc import Callable
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
    RewardError,
    RunCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.conditioning import Conditioning, for_each_prompt, own_conditioning, tensors_in, told, with_prompt
from diffgraft.methods.decoding import decode, ensure_decodes
from diffgraft.methods.predictions import clean_estimate, known_kind, levels_of, prediction_kind
from diffusers.image_processor import VaeImageProcessor
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffgraft_black_scholes.method import call_price, official_value, takes_second, volatility

__all__ = ["BlackScholes"]
__version__ = "0.1.0"

Texts = tuple[list[str], list[str]]
LARGEST_LOG = 600.0
"""The exponential of more is no float64."""


class BlackScholesConfig(PluginConfig):
    """Knobs of Black-Scholes prompt mixing."""

    prompt: str | tuple[str, ...] | None = Field(
        None, description="the second prompt, or one for each prompt of the call, whose own prompt is the first; none: off"
    )
    scorer: Any = Field(
        None,
        description="how well a picture shows a prompt, a callable (images, prompts) -> numbers or the name of one (the paper: CLIP's)",
    )
    spot: Literal["score", "percent"] = Field(
        "score", description="S: the score as it is, above 0 (CLIP's logits), or 100 exp(score), of log-probabilities"
    )
    rule: Literal["call", "official", "alternating", "average"] = Field(
        "call",
        description="which prompt comes next: that of the cheaper call option; the official code's formula; or, without a scorer, "
        "what both are compared with: the two in turn, or the mean of both at every step",
    )
    captions: tuple[str, str] | None = Field(
        None, description="what the scorer is given for the first and second prompt; none: the prompts"
    )
    decoder: Any = Field(
        None,
        description="makes the pictures that are scored, a callable (latents) -> pixels [batch, 3, height, width] in -1 to 1 (a tiny "
        "autoencoder's decode); none: the pipeline's own autoencoder",
    )

    @field_validator("scorer", "decoder")
    @classmethod
    def _callable(cls, value: Any, info: Any) -> Any:
        if value is not None and not callable(value) and not (isinstance(value, str) and info.field_name == "scorer"):
            what = "(images, prompts) -> numbers, or the name of one" if info.field_name == "scorer" else "(latents) -> pixels"
            raise ValueError(f"give a callable {what}")
        return value

    @model_validator(mode="after")
    def _can_choose(self) -> BlackScholesConfig:
        if self.prompt is not None and self.scores and self.scorer is None:
            raise ValueError(
                f"rule = {self.rule!r} chooses by how well a picture shows a prompt, and scorer is none: give a scorer "
                "('diffgraft_black_scholes.scorers:clip' is the paper's), or rule = 'alternating'"
            )
        return self

    @property
    def scores(self) -> bool:
        """Whether the rule asks the scorer."""
        return self.rule in ("call", "official")


@dataclass
class Mixing:
    """Of one run: the second prompt, which samples take it at each step, and what was seen at each but the last."""

    heard: Conditioning | None = None
    texts: Texts | None = None
    takes: list[Tensor] = field(default_factory=list)
    """[batch] for each step, on the CPU; no sample does at the first."""
    spots: list[Tensor] = field(default_factory=list)
    prices: list[Tensor] = field(default_factory=list)


class BlackScholes(Plugin):
    name = "black_scholes"
    paper = Paper(
        title="Financial Models in Generative Art: Black-Scholes-Inspired Concept Blending in Text-to-Image Diffusion",
        arxiv="2405.13685",
        implemented="one of two prompts at each step, by the Black-Scholes price of how well the picture in the making shows it",
        omitted="step-wise switching at fixed steps, with which the paper compares",
        licence="official code without a licence; written from the formulas",
    )
    families = ("sd", "sdxl", "sd3", "flux")
    Config = BlackScholesConfig
    State = Mixing
    neutral: ClassVar[dict[str, Any]] = {"prompt": None, "scorer": None}
    active: ClassVar[dict[str, Any]] = {"prompt": "a green dog on the right", "scorer": "diffgraft_black_scholes.scorers:colours"}
    effects = Effects(edits=frozenset({"conditioning"}), needs=frozenset({"all_blocks"}))
    needs = (Need("reward", "scorer"),)
    config: BlackScholesConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.rule == "official":  # it rests on the last bits of the scores, which differ in a batch
            self.effects = replace(self.effects, couples_batch=True)

    def check(self, target: Target) -> None:
        if self.config.prompt is None or not self.config.scores:
            return
        known_kind(target.family, target.pipe.scheduler)
        if self.config.decoder is None:
            try:
                ensure_decodes(target.pipe, target.family)
            except Unsupported as error:
                raise Unsupported(f"black_scholes: {error}; or give decoder = ...") from None

    def run(self, call: RunCall, next: Any) -> Any:
        shared: Mixing = call.shared
        shared.__init__()  # type: ignore[misc]  # an outer plugin may run the pipeline several times
        if self.config.prompt is None:
            call.note("inactive: prompt is none, so there is no second prompt to mix the call's with; give prompt=...")
            return next(call)
        for other in call.others:
            if "own_steps" in other.effects.needs:
                raise Unsupported(
                    f"black_scholes chooses a prompt from step to step, but the calls of {other.name} are no successive steps: disable one"
                )
        if not self.config.scores and (
            idle := [name for name in ("scorer", "captions", "decoder") if getattr(self.config, name) is not None]
        ):
            call.note(f"not used with rule = {self.config.rule!r}: {', '.join(idle)}")
        arguments = call.arguments()
        second = for_each_prompt(self.name, self.config.prompt, arguments)
        if self.config.scores:
            shared.texts = self.scored_texts(arguments, second)
        shared.heard = own_conditioning(call.pipe, with_prompt(arguments, second))
        result = next(call)
        self.tell(call)
        return result

    def scored_texts(self, arguments: dict[str, Any], second: list[str]) -> Texts:
        """What the scorer is given for the two prompts, a text for each prompt of the call."""
        if self.config.captions is not None:
            return [self.config.captions[0]] * len(second), [self.config.captions[1]] * len(second)
        first = arguments.get("prompt")
        if first is None:
            raise ConfigError("plugin 'black_scholes': captions = None, and the call has no prompt in words for the scorer: give captions")
        return [first] if isinstance(first, str) else list(first), second

    def tell(self, call: RunCall) -> None:
        """What the run did, in the report."""
        shared: Mixing = call.shared
        if not shared.takes:
            return
        taken = torch.stack(shared.takes)
        call.record({"second": taken})
        if shared.prices:
            call.record({"spots": torch.stack(shared.spots), "prices": torch.stack(shared.prices)})
        shares = ", ".join(f"{int(n)} of {len(taken)}" for n in taken.sum(0)[:4]) + (", ..." if taken.shape[1] > 4 else "")
        call.note(f"steps with the second prompt: {shares}")
        if not taken.any():
            call.note("inactive: no step took the second prompt")

    # the denoiser's calls -----------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        shared: Mixing = call.shared
        if shared.heard is None or "cond" not in call.texts:
            return next(call)  # type: ignore[no-any-return]
        ensure_alike(own(call, "cond"), shared.heard)
        if self.config.rule == "average":
            return next(mixed(call, shared.heard, half_way))  # type: ignore[no-any-return]
        if call.step.index == 0:
            return next(call)  # type: ignore[no-any-return]
        if len(shared.takes) <= call.step.index:
            raise Unsupported("black_scholes: a plugin further out answered the scheduler's step in its place; put black_scholes first")
        rows = shared.takes[call.step.index].to(call.sample.device)

        def chosen(first: Tensor, second: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (first.ndim - 1)), second, first)

        return next(mixed(call, shared.heard, chosen))  # type: ignore[no-any-return]

    # the step -----------------------------------------------------------------------------------------------------------------------

    def step(self, call: StepCall, next: Any) -> StepOutput:
        shared, step = call.shared, call.step
        if shared.heard is None or self.config.rule == "average" or step.stage:  # a solver's step keeps its prompt in all its calls
            return next(call)  # type: ignore[no-any-return]
        if step.index == 0:  # of this pass: an inner plugin may make several
            shared.takes, shared.spots, shared.prices = [torch.zeros(len(call.sample), dtype=torch.bool)], [], []
        if step.index + 1 < step.total:
            shared.takes.append(self.next_prompt(call))
        return next(call)  # type: ignore[no-any-return]

    def next_prompt(self, call: StepCall) -> Tensor:
        """Which samples take the second prompt at the next step [batch]. The scheduler is not asked."""
        step, rows = call.step, len(call.sample)
        if self.config.rule == "alternating":
            return torch.full((rows,), step.index % 2 == 0)
        spots, rate, left = self.spots(call), 1 / step.total, step.total - step.index
        s = float(volatility_of(call))  # check: allow host_sync because the pictures for the scorer were waited for already
        prices = (call_price if self.config.rule == "call" else official_value)(spots, rate, s, left)
        call.shared.spots.append(spots)
        call.shared.prices.append(prices)
        # dC/dS = N(d1) > 0: the cheaper call is that of the lower spot, which tells apart what prices that are nearly 0 do not
        return takes_second(*(spots if self.config.rule == "call" else prices))

    def spots(self, call: StepCall) -> Tensor:
        """S of both prompts [2, batch], of the pictures that this step points to."""
        images = self.previews(call)
        shared, scorer = call.shared, call.given("scorer")
        rows = [[text for text in texts for _ in range(len(images) // len(texts))] for texts in shared.texts]
        scores = [scorer(images, texts) for texts in rows]
        for score in (*scores[0], *scores[1]):
            if self.config.spot == "score" and score <= 0:
                why = "a price must be above 0; spot = 'percent' takes log-probabilities"
            elif self.config.spot == "percent" and abs(score) > LARGEST_LOG:
                why = "its exponential is no number; give mean log-probabilities, or spot = 'score'"
            else:
                continue
            raise RewardError(f"black_scholes, step {call.step.index + 1}: scorer {scorer.name!r} gave {score:.4g}: {why}")
        spots = torch.tensor(scores, dtype=torch.float64)
        return 100 * spots.exp() if self.config.spot == "percent" else spots

    def previews(self, call: StepCall) -> list[Any]:
        """Pictures of the clean samples that this step's prediction and sample imply."""
        kind = prediction_kind(call.family, call.pipe.scheduler)
        x0 = clean_estimate(call.sample.float(), call.model_output.float(), levels_of(call), kind).to(call.sample.dtype)
        call.count("previews", len(x0))
        decoder: Callable[[Tensor], Tensor] | None = self.config.decoder
        if decoder is None:
            images: list[Any] = decode(call.pipe, call.family, x0, call.run.arguments)
            return images
        with torch.no_grad():
            pixels = decoder(x0)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[:2] != (len(x0), 3):
            found = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
            raise ConfigError(f"plugin 'black_scholes': decoder gave {found}: it must give pixels [{len(x0)}, 3, height, width]")
        if not pixels.isfinite().all():
            raise ConfigError("plugin 'black_scholes': decoder gave pixels that are not finite; in float16 an autoencoder may overflow")
        return VaeImageProcessor().postprocess(pixels, output_type="pil")  # type: ignore[no-any-return]


def own(call: DenoiseCall, branch: str) -> dict[str, Any]:
    """A branch's own conditioning in this call."""
    return told(call.only(branch) if branch in call.branches else call)


def ensure_alike(first: dict[str, Any], heard: Conditioning) -> None:
    """Raises Unsupported where the two prompts' conditionings cannot stand in one batch."""
    second = heard.of_branch["cond"]
    a, b = ([tuple(x.shape) for name in first for x in tensors_in(part.get(name))] for part in (first, second))
    if a != b:
        raise Unsupported(
            f"black_scholes: the call's prompt is {a} to the denoiser, the second one {b}: give the call's prompt as text, or as "
            "embeddings with as many tokens as the pipeline makes itself"
        )


def mixed(call: DenoiseCall, heard: Conditioning, mix: Callable[[Tensor, Tensor], Tensor]) -> DenoiseCall:
    """The call with ``mix(first, second)`` for each tensor of the prompts' conditioning; what is guided away from stays."""
    parts = {branch: own(call, branch) for branch in call.texts}
    parts["cond"] = each(parts["cond"], heard.of_branch["cond"], mix)
    return Conditioning(parts).put_into(call)


def each(first: Any, second: Any, mix: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """``mix`` of the tensors of two conditionings of one form: nested dicts and lists."""
    if isinstance(first, Tensor):
        return mix(first, second.to(first))
    if isinstance(first, dict):
        return {name: each(value, second[name], mix) for name, value in first.items()}
    if isinstance(first, (list, tuple)):
        return type(first)(each(a, b, mix) for a, b in zip(first, second, strict=True))
    return first


def half_way(first: Tensor, second: Tensor) -> Tensor:
    """The mean of both."""
    return torch.lerp(first, second, 0.5)


def volatility_of(call: StepCall) -> Tensor:
    """s of one step of the training's schedule at this step's noise level (0-dim)."""
    scheduler, step = call.pipe.scheduler, call.step
    n = scheduler.config.num_train_timesteps
    if call.family.prediction == "flow":
        assert step.sigma is not None  # flow schedulers have sigmas
        sigma = step.sigma.double().clamp(max=1 - 2 / n)  # the last step of training has no volatility: no signal is left in it
        return volatility(abar_of_flow(sigma + 1 / n), abar_of_flow(sigma))
    abar = scheduler.alphas_cumprod.to(step.t.device, non_blocking=True)
    t = step.t.long().clamp(max=n - 2)
    return volatility(abar.take(t + 1), abar.take(t))


def abar_of_flow(sigma: Tensor) -> Tensor:
    """The share of the signal in a flow sample, (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2)."""
    return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
