"""Diversity distillation: the base model answers a distilled model's first step, which decides what all pictures of a prompt share
(Gandikota, Bau, arXiv 2503.10637).

Step i of D's schedule is answered by B with guidance w_B for i < k, by D as ever from k on. B is a second pipeline, or D itself with its
LoRA off. With ``base_steps`` B makes N_B steps of its own schedule instead and hands its latents over (:mod:`.base`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

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
    Target,
    Unsupported,
    denoisers_of,
)
from diffgraft.methods.adapters import adapter_layers, removable_layers, without_adapters
from diffgraft.methods.conditioning import Conditioning, PromptWatch, ask, same_text_encoders
from diffgraft.methods.inputs import parameters
from diffgraft.methods.predictions import known_kind
from diffgraft.methods.second import dtype_difference
from diffusers import DiffusionPipeline, ModularPipeline
from pydantic import Field
from torch import Tensor

from diffgraft_diversity_distillation.base import estimate, first_part, listen, steps_once, twin
from diffgraft_diversity_distillation.method import guided

__all__ = ["DiversityDistillation", "DiversityDistillationConfig"]
__version__ = "0.1.0"

LORA_SCALE = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
"""Where diffusers' pipelines take {"scale": strength of the LoRA}."""


class DiversityDistillationConfig(PluginConfig):
    """Knobs of :class:`DiversityDistillation`."""

    steps: int = Field(1, ge=0, description="k: the base answers the first k steps of a run, the distilled model the others; 0 is off")
    model: str | Path | DiffusionPipeline | ModularPipeline | None = Field(
        None, description="B: the base pipeline (bundled name, folder, Hub id, live); none: the pipeline's own denoiser with its LoRA off"
    )
    guidance_scale: float = Field(
        7.0, ge=0, description="w_B: guidance scale of the base; 1 or less: none (official code: 7; in the paper less is more diverse)"
    )
    base_steps: int | None = Field(
        None,
        ge=1,
        description="N_B: the base makes this many steps of its own schedule down to the distilled model's step k, and hands its latents "
        "over; none: it answers the distilled model's own first k steps",
    )
    base_arguments: dict[str, Any] = Field(
        default_factory=dict,
        description="call arguments for the base in the place of the run's own, such as its negative_prompt or embedded guidance_scale",
    )
    lora_strength: float = Field(
        1.0,
        gt=0,
        le=2,
        description="strength of the pipeline's LoRA in all steps; less than 1, with steps=0, is the alternative for flow models",
    )
    preview: bool = Field(False, description="DT-visualisation: record the x0 estimate of every step in the report")


@dataclass
class Held:
    """Kept in one run. ``listen`` and ``start`` know the run's arguments and are called at most once."""

    listen: Callable[[], Conditioning] | None = None
    conditioning: Conditioning | None = None
    own_text: bool = False
    """Whether the base must be given its own conditioning even where the run's would do."""
    start: Callable[..., Any] | None = None
    handed: Tensor | None = None
    """Latents of the base, at the scale of the distilled model's scheduler."""
    stand_in: Tensor | None = None
    """What the steps that the base took the place of are given for a prediction [batch, ...]; their result is thrown away."""
    estimates: list[Tensor] = field(default_factory=list)
    watch: PromptWatch = field(default_factory=PromptWatch)


class DiversityDistillation(Plugin):
    """Base model for the first k steps, distilled model for the others."""

    name = "diversity_distillation"
    paper = Paper(
        title="Distilling Diversity and Control in Diffusion Models",
        arxiv="2503.10637",
        implemented="hybrid inference with a base pipeline or with the distillation LoRA off for the first k steps, on the distilled "
        "model's schedule or on the base's own; Diffusion-Target visualisation (the x0 estimate of every step)",
        omitted="control transfer, which needs no code: load the slider or LoRA into the distilled pipeline; the paper's measurements",
        licence="official code MIT; written from the paper's description",
    )
    families = ("sd", "sdxl", "sd3", "flux", "qwen_image", "pixart", "wan")
    Config = DiversityDistillationConfig
    State = Held
    neutral: ClassVar[dict[str, Any]] = {"steps": 0}
    active: ClassVar[dict[str, Any]] = {"steps": 1}
    sessions = True
    effects = Effects(
        replaces=frozenset({"denoiser"}), edits=frozenset({"prediction", "latents"}), needs=frozenset({"extra_forwards", "all_blocks"})
    )
    needs = (Need("pipeline", "model"),)
    config: DiversityDistillationConfig

    # before anything is touched ----------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        config, pipe, family = self.config, target.pipe, target.family
        takes = parameters(pipe)
        if config.lora_strength != 1 and not set(LORA_SCALE) & set(takes):
            raise Unsupported(
                f"diversity_distillation: lora_strength = {config.lora_strength}: {type(pipe).__name__} takes none of "
                f"{', '.join(LORA_SCALE)}; use pipe.set_adapters(name, strength) instead"
            )
        if not config.steps:
            return
        if config.guidance_scale > 1 and family.guidance.layout == "none":
            raise Unsupported(
                f"diversity_distillation: guidance_scale = {config.guidance_scale}: {type(pipe).__name__} has no guidance, so its base has "
                "none either; set guidance_scale=1"
            )
        if config.base_steps is not None and "strength" in takes:
            raise Unsupported(
                f"diversity_distillation: base_steps = {config.base_steps}: {type(pipe).__name__} does not start from pure noise, as the "
                "base's own schedule would; leave base_steps out, then the base answers the first steps of this run"
            )
        base = target.given["model"]
        if (why := dtype_difference(pipe, base, family)) is not None:
            raise Unsupported(f"diversity_distillation: model = {type(base).__name__} does not fit: {why}")

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        config, shared = self.config, call.shared
        shared.__init__()  # an outer plugin may run the pipeline several times
        if config.lora_strength != 1:
            call = self._weakened(call)
        if config.preview:
            known_kind(call.family, call.pipe.scheduler)
        if config.steps:
            self._prepare(call)
        result = next(call)
        if shared.watch.changed:
            call.note("a callback changed the prompt in mid-run: the base, which was told the prompt by itself, kept that of the call")
        if config.preview:
            call.record({"x0": torch.stack(shared.estimates)})
        return result

    def _weakened(self, call: RunCall) -> RunCall:
        """``call`` with the LoRA's strength multiplied, through diffusers' own argument for it."""
        for model in denoisers_of(call.pipe, call.family).values():
            removable_layers(model)
        name = next(name for name in LORA_SCALE if name in parameters(call.pipe))
        old = call.get(name) or {}
        return call.replace(**{name: {**old, "scale": old.get("scale", 1.0) * self.config.lora_strength}})  # type: ignore[no-any-return]

    def _prepare(self, call: RunCall) -> None:
        """Refuse what cannot work, and note how the base will be asked."""
        config, shared, guidance = self.config, call.shared, call.family.guidance
        base = call.given("model")
        if base is None:
            for model in denoisers_of(call.pipe, call.family).values():
                removable_layers(model)
        else:
            shared.own_text = not same_text_encoders(call.pipe, base)
        shared.own_text |= bool(config.base_arguments)
        takes = parameters(base or call.pipe)  # a base of another class (without ControlNet) takes less
        given = {name: value for name, value in call.arguments().items() if name in takes and not name.startswith("ip_adapter")}
        if guidance.requires and all(given.get(name) is None for name in guidance.requires):  # no negative prompt would be no guidance
            prompt = given.get("prompt")
            given[guidance.requires[0]] = [""] * len(prompt) if isinstance(prompt, list) else ""
        given |= config.base_arguments
        if config.base_steps is not None:
            for scheduler, whose in ((call.pipe.scheduler, "the pipeline's"), (getattr(base, "scheduler", None), "the base's")):
                if scheduler is not None and not steps_once(scheduler, strictly=whose != "the base's"):
                    raise Unsupported(
                        f"diversity_distillation: base_steps = {config.base_steps}: {whose} {type(scheduler).__name__} needs the steps "
                        "before it (or several stages a step) and cannot be entered in the middle; use DDIM, Euler, LCM or FlowMatchEuler, "
                        "or leave base_steps out"
                    )
            if shared.own_text and (embeds := [name for name, value in given.items() if "embeds" in name and value is not None]):
                raise Unsupported(
                    f"diversity_distillation: {', '.join(embeds)}: embeddings of this pipeline say nothing to the base, which has another "
                    "text encoder; give the prompt as text"
                )
            shared.start = partial(first_part, base, {**given, guidance.scale: config.guidance_scale}, config.base_steps, config.preview)
        else:
            # both halves are heard at any scale above 1
            shared.listen = partial(listen, base, call.pipe, {**given, guidance.scale: max(config.guidance_scale, 2.0)})

    # in the run --------------------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        if call.step.index >= self.config.steps:
            call.count("distilled", len(call.branches))
            return next(call)
        shared, w = call.shared, self.config.guidance_scale
        if shared.own_text or self.config.base_steps is not None:
            shared.watch.see(call)
        if self.config.base_steps is not None:
            if shared.stand_in is None:
                self._hand_over(call)
            return torch.cat([shared.stand_in] * len(call.branches))
        prediction = self._ask(self._heard(call).put_into(call) if shared.own_text else call, next)
        if w <= 1 or call.guided:  # a pipeline that guides by itself asks for each half; `guide` puts them together with w_B
            return prediction
        return guided(self._ask(self._heard(call).put_into(call, "uncond"), next), prediction, w)

    def guide(self, call: GuideCall, next: Callable[[GuideCall], Tensor]) -> Tensor:
        if call.step.index >= self.config.steps or self.config.base_steps is not None:
            return next(call)
        out = guided(call.uncond, call.cond, self.config.guidance_scale)
        if call.branches.keys() - set(call.family.guidance.order):  # the pipeline's further term (skip-layer guidance) stays as it is
            out = out + (call.combined - guided(call.uncond, call.cond, call.scale))
        return out

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        step, shared = call.step, call.shared
        replaced = self.config.base_steps is not None and step.index < self.config.steps
        if self.config.preview and not replaced:
            shared.estimates.append(estimate(call))
        if replaced and "generator" in call.arguments():  # the result is thrown away, and its noise must not be drawn from the run's
            call = call.replace(generator=twin(call["generator"]) or torch.Generator(call.sample.device))
        out = next(call)  # also where its result is thrown away: the scheduler must count this step
        hands_over = replaced and step.ends_step and step.index == min(self.config.steps, step.total) - 1
        return StepOutput(shared.handed) if hands_over else out

    def _ask(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        """The base's prediction for this call [rows, ...]."""
        call.count("base", len(call.branches))
        base = call.given("model")
        model = call.model if base is None else getattr(base, call.model_name, None) or getattr(base, call.family.denoisers[0])
        if model is call.model:  # the same weights without their LoRA; where they have none, B is D
            call.acted()
            with without_adapters(model) if adapter_layers(model) else nullcontext():
                return next(call)
        arguments = call.arguments()
        if getattr(model.config, "time_cond_proj_dim", None) is None:
            arguments.pop("timestep_cond", None)  # the guidance embedding of a consistency model, which its base does not know
        return ask(call.family, model, arguments)

    def _heard(self, call: DenoiseCall) -> Conditioning:
        """What the base makes of the prompt; asked for at the first call that needs it."""
        shared = call.shared
        if shared.conditioning is None:
            found = shared.listen()
            if "uncond" not in found.of_branch:
                raise Unsupported(
                    f"diversity_distillation: guidance_scale = {self.config.guidance_scale}: the base makes no unconditional half of its "
                    "conditioning (a model with a guidance embedding?); set guidance_scale=1"
                )
            shared.conditioning = found
        return shared.conditioning  # type: ignore[no-any-return]

    def _hand_over(self, call: DenoiseCall) -> None:
        """Let the base make its part of the run, from the same noise."""
        shared, k = call.shared, self.config.steps
        part = shared.start(call, call.start_of(k) if k < call.step.total else None)
        shared.handed, shared.stand_in, shared.estimates = part.latents, part.prediction, part.estimates
        call.count("base", part.forwards)
        call.note(f"the base made {part.steps} of its {part.total} steps, then the distilled model went on at its step {k}")
