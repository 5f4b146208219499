"""Normalized Attention Guidance: a negative prompt for models without classifier-free guidance.

(Chen, Bandyopadhyay, Zou, Song, arXiv 2505.21179.) Every cross-attention layer is asked for the positive and for the negative text with the
same queries; what it gives is moved away from the negative answer, held to a length, and mixed with the positive one. One denoiser call a
step stays one. A U-Net's layers take the text as it was encoded; a DiT projects it first, so there the negative text goes in behind the
positive one, as further tokens, and the layers part them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from diffgraft import (
    AttentionCall,
    AttentionInfo,
    ConfigError,
    DenoiseCall,
    Effects,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    Unsupported,
)
from diffgraft.methods.conditioning import for_each_prompt, own_conditioning, with_prompt
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from diffgraft_nag.layer import Window, as_rows, ask_twice
from diffgraft_nag.method import guided

__all__ = ["NAG"]
__version__ = "0.1.0"

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"


class NAGConfig(PluginConfig):
    """Knobs of Normalized Attention Guidance."""

    negative_prompt: str | tuple[str, ...] | None = Field(
        None, description="what is to be avoided, one text or one for each prompt of the call; none: the call's own negative_prompt, else "
        "the empty text"
    )  # fmt: skip
    scale: float = Field(
        5.0, ge=1, description="1 + phi, as in the official code: how far to go away from the negative text (paper's phi: 4 for Flux and "
        "SD3.5, 2 for SDXL and SANA, 1 for SD 1.5); 1 is off"
    )  # fmt: skip
    tau: float = Field(2.5, gt=0, description="tau: how many times longer than its positive one a token may become, in L1 norm")
    alpha: float = Field(
        0.25, gt=0, le=1, description="alpha: share of the guided feature in the result (paper: 0.25 for Flux, 0.125 for SD3.5, 0.5 for "
        "U-Nets and SANA)"
    )  # fmt: skip
    start: float = Field(0.0, ge=0, lt=1, description="share of the run's steps before which nothing is done")
    end: float = Field(1.0, gt=0, le=1, description="theta: share of the run's steps after which nothing is done (paper: 0.25 is enough)")

    @field_validator("end")
    @classmethod
    def _after_start(cls, end: float, info: ValidationInfo) -> float:
        if end <= info.data.get("start", 0.0):
            raise ValueError(f"not after start = {info.data['start']}")
        return end


@dataclass
class Negative:
    """In one run: the negative text as the denoiser takes it [samples, tokens, width], its mask, and the layout of the call in progress."""

    text: Tensor | None = None
    mask: Tensor | None = None
    window: Window | None = None


class NAG(Plugin):
    name = "nag"
    paper = Paper(
        title="Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models",
        arxiv="2505.21179",
        implemented="negative guidance in every cross-attention layer, with or without classifier-free guidance, for a share of the steps",
        omitted="joint attention (Flux, SD3, Qwen-Image): the negative text would need a stream of its own through all blocks",
        licence="official code read for facts only; written from the equations",
    )
    families = (
        "sd", "latent_consistency", "sd_edit", "sdxl", "sdxl_edit", "animatediff", "pixart", "wan", "skyreels_df", "ltx", "ltx_image",
    )  # fmt: skip
    Config = NAGConfig
    State = Negative
    neutral: ClassVar[dict[str, Any]] = {"scale": 1.0}
    active: ClassVar[dict[str, Any]] = {"negative_prompt": "a green dog on the right", "scale": 5.0, "alpha": 0.5}
    effects = Effects(edits=frozenset({"attention", "conditioning"}))
    config: NAGConfig

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        return [layer for layer in layers if layer.is_cross and self.config.scale > 1]

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.scale == 1:
            return next(call)
        self.ensure_outside(call)
        memory: Negative = call.shared
        memory.__init__()  # type: ignore[misc]  # an outer plugin may run the pipeline several times
        arguments = call.arguments()
        texts = for_each_prompt(self.name, self.said(call), arguments)
        heard = own_conditioning(call.pipe, with_prompt(arguments, texts)).of_branch.get("cond", {})
        if TEXT not in heard:
            raise Unsupported(f"nag: {type(call.pipe).__name__} was not heard to give its denoiser a text")
        memory.text, memory.mask = heard[TEXT], heard.get(MASK)
        return next(call)

    def said(self, call: RunCall) -> Any:
        """The negative text: the knob's, the call's own, or none."""
        if self.config.negative_prompt is not None:
            return self.config.negative_prompt
        if call.get("negative_prompt") is None and call.get("negative_prompt_embeds") is not None:
            raise ConfigError("plugin 'nag': negative_prompt = None: the call gives negative_prompt_embeds; say the negative one as text")
        return call.get("negative_prompt") or ""

    def ensure_outside(self, call: RunCall) -> None:
        """Raises Unsupported where a plugin further in would read the widened text with a model that is asked past our layers."""
        if call.family.kind != "dit":
            return
        entries = list(call.run.entries)
        for inner in entries[entries.index(call.entry) + 1 :]:
            effects = inner.plugin.effects
            if not inner.plugin.is_neutral and ("plain_gradients" in effects.needs or "denoiser" in effects.replaces):
                raise Unsupported(f"nag: {inner.name} asks a denoiser past the other plugins' layers; put {inner.name} before nag")

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        memory, knobs, step = call.shared, self.config, call.step
        if memory.text is None or not knobs.start <= step.index / step.total < knobs.end or "cond" not in call.texts:
            return next(call)  # type: ignore[no-any-return]
        parts, text, changes = len(call.texts), call[TEXT], {}
        negative = as_rows(memory.text, len(text) // parts).to(text)
        memory.window = Window(parts, call.texts.index("cond"), negative)
        if call.family.kind == "dit":
            memory.window = Window(parts, memory.window.at, None, text.shape[1], negative.shape[1])
            changes = self.widened(call, negative, parts)
        call.count("guided")
        try:
            return next(call.replace(**changes))  # type: ignore[no-any-return]
        finally:
            memory.window = None

    def widened(self, call: DenoiseCall, negative: Tensor, parts: int) -> dict[str, Tensor]:
        """The call's text and mask with the negative ones behind, in every part alike: those of the others are parted and not looked at."""
        text, mask, other = call[TEXT], call.get(MASK), call.shared.mask
        changes = {TEXT: torch.cat([text, torch.cat([negative] * parts)], 1)}
        if mask is not None or other is not None:
            own = text.new_ones(text.shape[:2]) if mask is None else mask
            other = negative.new_ones(negative.shape[:2]) if other is None else as_rows(other, len(negative))
            changes[MASK] = torch.cat([own, torch.cat([other.to(own)] * parts)], 1)
        return changes

    def attention(self, call: AttentionCall, next: Any) -> Any:
        window: Window | None = call.shared.window
        if window is None:
            return next(call)
        knobs = self.config
        return ask_twice(call, next, window, partial(guided, scale=knobs.scale, tau=knobs.tau, alpha=knobs.alpha))

