"""diffusers' guiders (APG, CFG-Zero*, TCFG, FDG, MAMBO-G, SLG, PAG, SEG, AutoGuidance) in standard pipelines.

A guider of diffusers is an object of its modular pipelines: it says which predictions it wants in a step, puts hooks on the denoiser for
some, and makes one of all. Here the standard pipeline's own denoiser calls give the predictions, and the guider's own methods are called.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import DenoiseCall, Effects, GuideCall, Paper, Plugin, PluginConfig, RunCall, Target, Unsupported, denoisers_of
from diffusers.guiders import BaseGuidance
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from diffgraft_diffusers_guider.guiders import (
    build,
    checked_options,
    class_of,
    dropout_of,
    ensure_axes,
    may_stop,
    perturbs,
    remarks,
    stays_zero,
)
from diffgraft_diffusers_guider.perturbed import ensure_layers, perturbed

__all__ = ["DiffusersGuider"]
__version__ = "0.1.0"

Next = Callable[[DenoiseCall], Tensor]
NORMED = ("qwen_image", "qwen_image_edit")
"""Families whose pipelines, standard and modular, give each token of what guidance makes the length of the conditional one's."""
FLAT = ("MagnitudeAwareGuidance",)
"""Guiders that take norms over all axes but the batch, by a function of torch that has them of at most two: they get one axis."""


class DiffusersGuiderConfig(PluginConfig):
    """Knobs of the guider."""

    guider: str | BaseGuidance | None = Field(
        None, description="a guider of diffusers: the name of its class (`AdaptiveProjectedGuidance`) or an object; none: off"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="of a guider by name: its class's own arguments, in its own ranges. Without `guidance_scale` the call's scale holds",
    )

    @field_validator("guider")
    @classmethod
    def ensure_known(cls, value: Any) -> Any:
        if isinstance(value, str):
            class_of(value)
        return value

    @model_validator(mode="after")
    def ensure_options(self) -> DiffusersGuiderConfig:
        if self.options and not isinstance(self.guider, str):
            raise ValueError("options are those of a guider given by name; an object has its own, and without a guider there are none")
        if isinstance(self.guider, str):
            checked_options(class_of(self.guider), self.options)
        return self


@dataclass
class Guiding:
    """Of one run: the guider, in its state of this step, and what it wants there."""

    guider: Any = None
    call: int = -1
    """The ``scheduler.step`` call that it is prepared for."""
    index: int = -1
    wanted: list[Any] = field(default_factory=list)
    """What ``prepare_inputs`` gave: one for each prediction."""
    cond: Tensor | None = None
    extra: Tensor | None = None
    """This step's prediction of the conditional branch with layers perturbed, as the denoiser gave it."""
    whole: bool = False
    """Whether a batch of both branches is asked whole although the guider wants one: another plugin keeps what blocks return for it."""
    asked: set[str] = field(default_factory=set)
    """Every prediction that it has wanted in this run."""


class DiffusersGuider(Plugin):
    name = "diffusers_guider"
    paper = Paper(
        title="Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models (APG); further guiders of diffusers: "
        "CFG-Zero* (2503.18886), TCFG (2503.18137), FDG (2506.19713), MAMBO-G (2508.03442), SLG and STG (2411.18664), PAG (2403.17377), "
        "SEG (2408.00760), AutoGuidance (2406.02507)",
        arxiv="2410.02416",
        implemented="diffusers' own guider classes, fed with the predictions of standard pipelines, perturbed forwards included",
        omitted="LTX2Guidance, which works on the clean samples of sound and picture of one pipeline; AutoGuidance by a second, weaker "
        "model, which diffusers' class has not",
        licence="diffusers is Apache-2.0; its classes are called, not copied",
    )
    families = (
        *("sd", "sd_upscale", "sdxl", "animatediff", "dit", "pixart", "cogvideox", "sd3", "flux", "flux_kontext", "qwen_image"),
        *("qwen_image_edit", "wan", "ltx", "ltx_image", "chroma", "sdxl_modular", "flux_modular", "wan_modular"),
    )
    Config = DiffusersGuiderConfig
    State = Guiding
    neutral: ClassVar[dict[str, Any]] = {"guider": None, "options": {}}
    active: ClassVar[dict[str, Any]] = {"guider": "AdaptiveProjectedGuidance", "options": {"guidance_scale": 5.0, "eta": 0.0}}
    effects = Effects(
        skips=frozenset({"branches"}),
        edits=frozenset({"prediction"}),
        needs=frozenset({"extra_forwards", "all_blocks"}),
    )  # of a dropout between 0 and 1 also noise, see __init__
    config: DiffusersGuiderConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        given = self.config.guider
        self.template = None if given is None else build(given, self.config.options)
        """Copied for every run."""
        self.perturbs = None if self.template is None else perturbs(self.template)
        self.noisy = self.template is not None and dropout_of(self.template)
        self.own_scale = (
            not isinstance(given, str) or "guidance_scale" in self.config.options or not hasattr(self.template, "guidance_scale")
        )
        """Whether the guider's scale is its own; else it is the call's."""
        stops = self.template is not None and may_stop(self.template)
        self.effects = Effects(
            skips=frozenset({"branches"} if stops else ()),
            edits=frozenset({"prediction"} if self.template is not None else ()),
            needs=frozenset({"extra_forwards", "all_blocks"} if self.perturbs else ()),
            stochastic=self.noisy,
            couples_batch=self.noisy,
        )

    def check(self, target: Target) -> None:
        guider, family = self.template, target.family
        if guider is None:
            return
        name = type(guider).__name__
        if name == "FrequencyDecoupledGuidance" and family.latents != "bchw":
            raise Unsupported(
                f"diffusers_guider: {name} takes a Laplacian pyramid of pictures [batch, channels, height, width], and the latents of "
                f"family {family.name!r} are {family.latents}; use a family with plain latents (sd, sdxl, sd3, pixart)"
            )
        if set(family.guidance.order) != {"cond", "uncond"}:
            raise Unsupported(f"diffusers_guider: {family.name} has the branches {', '.join(family.guidance.order)}; guiders know two")
        ensure_axes(guider, {"packed": 3}.get(family.latents, len(family.latents)) if family.latents != "pixels" else 4)
        ensure_layers(guider, target)

    def run(self, call: RunCall, next: Any) -> Any:
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        if self.template is None:
            call.note("inactive: guider is none; give the name of one of diffusers' guiders")
            return next(call)
        name = type(self.template).__name__
        if call.extras:
            raise Unsupported(
                f"diffusers_guider: the call asks for {', '.join(call.extras)} guidance of the pipeline's own beside {name}; leave it out"
            )
        if call.get("guidance_rescale"):
            raise Unsupported(
                f"diffusers_guider: guidance_rescale = {call['guidance_rescale']} is of the formula that {name} replaces; give "
                "it among the guider's options"
            )
        # again: compiled, a LoRA on top, another denoiser since
        self.check(Target(call.pipe, call.family, denoisers_of(call.pipe, call.family), ()))
        scale = call.family.guidance.scale
        if self.own_scale and call.get(scale) is not None:
            call.note(f"the call's {scale} only switches guidance on and off; {name} has its own scale")
        call.shared.whole = self.ensure_place(call)
        for remark in remarks(self.template):
            call.note(remark)
        result = next(call)
        shared: Guiding = call.shared
        if shared.call < 0:
            call.note(f"inactive: guidance was off in this run, there was nothing to guide; {name} wants the call's {scale} above 1")
        elif (self.perturbs or "pred_uncond") not in shared.asked:
            what = "no layer was perturbed" if self.perturbs else "no step was guided"
            total = shared.guider._num_inference_steps
            call.note(f"{what}: {name}'s options want that in none of this run's {total} steps; widen the interval, or take more steps")
        return result

    def ensure_place(self, call: RunCall) -> bool:
        """Whether a batch of both branches must be asked whole, because another plugin keeps what blocks return for its rows.

        Raises:
            Unsupported: layers are to be perturbed in one branch alone, and a plugin further out works inside the forward of both.
        """
        if call.family.guidance.layout != "batched":
            return False
        entries = [entry for entry in call.run.entries if entry is call.entry or not entry.plugin.is_neutral]
        outer = [e for e in entries[: entries.index(call.entry)] if {"block", "attention"} & set(e.plugin.points())]
        if outer and self.perturbs:
            raise Unsupported(
                f"diffusers_guider: {outer[0].name} works inside the denoiser on the rows of both branches, and "
                f"{type(self.template).__name__} asks for one alone, with layers perturbed; put diffusers_guider before {outer[0].name}"
            )
        return bool(outer) or any("blocks" in entry.plugin.effects.skips for entry in entries)

    # the denoiser's calls -----------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Next) -> Tensor:
        if self.template is None or call.extra or not call.guided:
            return next(call)
        shared: Guiding = call.shared
        wanted = self.begin(call, call.run.guidance_scale(call.model_name))
        several = len(call.branches) > 1
        if "pred_uncond" not in wanted and "uncond" in call.branches and (not shared.whole if several else shared.cond is not None):
            out = self.without_uncond(call, next)
        elif "pred_uncond" in wanted and self.perturbs == "pred_uncond" and "uncond" in call.branches:
            out = torch.cat([self.branch(call, name, next) for name in call.branches])
        else:
            out = next(call)
        if "cond" in call.branches:
            shared.cond = out.chunk(len(call.branches))[call.branches.index("cond")]
            if self.perturbs in wanted and self.perturbs != "pred_uncond":
                with self.perturbed(call):
                    shared.extra = next(call.only("cond"))
                call.count("perturbed")
        return out

    def without_uncond(self, call: DenoiseCall, next: Next) -> Tensor:
        """The guider wants no unconditional prediction: the conditional one stands in its place, and the pipeline's formula gives that."""
        call.count("skipped")
        call.acted()
        if len(call.branches) > 1:
            return torch.cat([next(call.only("cond"))] * len(call.branches))
        return call.shared.cond  # type: ignore[no-any-return]

    def branch(self, call: DenoiseCall, name: str, next: Next) -> Tensor:
        """One branch alone, the unconditional one with layers perturbed."""
        if name != "uncond":
            return next(call.only(name))
        call.count("perturbed")
        with self.perturbed(call):
            return next(call.only(name))

    def perturbed(self, call: DenoiseCall) -> Any:
        """diffusers' hooks on this call's denoiser."""
        seed = None
        if self.noisy and call.generator is not None:
            first = call.generator[0] if isinstance(call.generator, list) else call.generator
            seed = first.initial_seed() + call.step.call
        return perturbed(call.shared.guider, call.model, seed)

    def begin(self, call: Any, scale: Any) -> set[str]:
        """The names of the predictions that the guider wants at this step; its state is set at the step's first call."""
        shared, step = call.shared, call.step
        if shared.guider is None or step.call < shared.call:
            shared.__init__(guider=deepcopy(self.template), whole=shared.whole, asked=shared.asked)
        guider = shared.guider
        if step.call != shared.call:
            if not self.own_scale and isinstance(scale, (int, float)):
                guider.guidance_scale = float(scale)
            guider.set_state(step=step.index, num_inference_steps=step.total, timestep=step.t)
            if step.index != shared.index or not shared.wanted:  # a solver's second call in a step is no new one: what is kept stays
                shared.wanted = guider.prepare_inputs({})
            shared.call, shared.index, shared.cond, shared.extra = step.call, step.index, None, None
        wanted = {getattr(batch, guider._identifier_key) for batch in shared.wanted}
        shared.asked |= wanted
        return wanted

    # the formula --------------------------------------------------------------------------------------------------------------------

    def guide(self, call: GuideCall, next: Any) -> Tensor:
        if self.template is None:
            return next(call)  # type: ignore[no-any-return]
        shared: Guiding = call.shared
        wanted = self.begin(call, call.scale)
        predictions = {"pred_cond": call.cond, "pred_uncond": call.uncond}
        if extra := wanted - predictions.keys():
            if shared.extra is None:
                raise Unsupported(
                    "diffusers_guider: a plugin further out answered this step's denoiser call in its place; put diffusers_guider first"
                )
            # in the layout of the pipeline's prediction, as the kernel brings it there: without learned variance or appended tokens
            predictions[extra.pop()] = shared.extra.narrow(1, 0, call.cond.shape[1]).to(call.cond.dtype)
        flat = type(shared.guider).__name__ in FLAT
        for batch in shared.wanted:
            said = predictions[getattr(batch, shared.guider._identifier_key)]
            batch.noise_pred = said.flatten(1) if flat else said
        pred = shared.guider(shared.wanted)[0].view_as(call.cond)
        if stays_zero(shared.guider):
            pred = torch.zeros_like(call.cond)
        for batch in shared.wanted:
            batch.noise_pred = None
        shared.cond = shared.extra = None
        return with_norm_of(call.cond, pred) if call.family.name in NORMED else pred


def with_norm_of(cond: Tensor, pred: Tensor) -> Tensor:
    """Each token of ``pred`` with the length of that of ``cond``, as Qwen-Image's pipelines end their guidance; nothing stays nothing."""
    length = torch.norm(pred, dim=-1, keepdim=True)
    return torch.where(length > 0, pred * (torch.norm(cond, dim=-1, keepdim=True) / length), pred)
