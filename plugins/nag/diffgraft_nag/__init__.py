"""Normalized Attention Guidance: a negative prompt for models without classifier-free guidance.

(Chen, Bandyopadhyay, Zou, Song, arXiv 2505.21179.) Every cross-attention layer is asked for the positive and for the negative text with the
same queries; what it gives is moved away from the negative answer, held to a length, and mixed with the positive one. One denoiser call a
step stays one. A U-Net's layers take the text as it was encoded; a DiT projects it first, so there the negative text goes in behind the
positive one, as further tokens, and the layers part them again. Where text and picture share one attention (Flux, SD3, Qwen-Image) the
negative text goes through the blocks in rows of its own: see ``joint``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    AttentionCall,
    AttentionInfo,
    BlockCall,
    BlockInfo,
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

from diffgraft_nag.joint import TEXT, Beside, ask_beside, holds_text_apart, is_joint, widened, with_one_picture
from diffgraft_nag.layer import Window, as_rows, ask_twice
from diffgraft_nag.method import guided

__all__ = ["NAG"]
__version__ = "0.1.0"

MASK = "encoder_attention_mask"
COPIES = ("num_images_per_prompt", "num_videos_per_prompt")
"""Of each text one is encoded, and its rows are repeated: Qwen-Image itself repeats masks of several texts in another order than these."""


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
    tau: float = Field(2.5, gt=0, description="tau: how many times longer than its positive one a token may become")
    alpha: float = Field(
        0.25, gt=0, le=1, description="alpha: share of the guided feature in the result (paper: 0.25 for Flux, 0.125 for SD3.5, 0.5 for "
        "U-Nets and SANA)"
    )  # fmt: skip
    norm: Literal["L1", "L2"] = Field(
        "L1", description="the norm in which tau is meant: L1 in the paper and in most of the official code, L2 in its Flux"
    )  # fmt: skip
    pooled: Literal["negative", "positive"] = Field(
        "negative", description="joint attention: whose pooled text the negative tokens are modulated with, their own (official Flux), or "
        "the positive one's (official SD3.5); models without a pooled text (Qwen-Image, Chroma) have none to choose"
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
    """In one run: the negative text's conditioning as the denoiser takes it, by argument, and the layout of the call in progress."""

    heard: dict[str, Any] = field(default_factory=dict)
    window: Window | Beside | None = None


class NAG(Plugin):
    name = "nag"
    paper = Paper(
        title="Normalized Attention Guidance: Universal Negative Guidance for Diffusion Models",
        arxiv="2505.21179",
        implemented="negative guidance in every layer where the picture reads the text, by cross-attention or joint attention, with or "
        "without classifier-free guidance, for a share of the steps",
        licence="official code read for facts only; written from the equations",
    )
    families = (
        # the text as it was encoded
        "sd", "sd_older", "sd_edit", "sd_upscale", "latent_consistency", "latent_diffusion", "stable_unclip", "gligen", "versatile", "sdxl",
        "sdxl_edit", "animatediff", "animatediff_xl",
        # as further tokens
        "pixart", "sana", "sana_video", "wan", "chronoedit", "skyreels", "skyreels_df", "ltx", "ltx_image", "allegro",
        # in rows of its own
        "flux", "flux_kontext", "flux_fill", "flux_control", "flux2", "flux2_klein", "sd3", "qwen_image", "qwen_image_edit", "chroma",
        "auraflow", "bria", "cogvideox", "cogview3", "easyanimate", "hunyuan_video", "longcat_image", "longcat_image_edit",
        "ovis_image",
    )  # fmt: skip
    not_on: ClassVar[dict[str, str]] = {
        "*ImageVariationPipeline": "its calls take no prompt",
        "PaintByExamplePipeline": "its calls take no prompt",
        "VisualClozeGenerationPipeline": "its calls say a task and a content in the place of a prompt",
    }
    Config = NAGConfig
    State = Negative
    neutral: ClassVar[dict[str, Any]] = {"scale": 1.0}
    active: ClassVar[dict[str, Any]] = {"negative_prompt": "a green dog on the right", "scale": 5.0, "alpha": 0.5}
    effects = Effects(edits=frozenset({"attention", "conditioning"}), needs=frozenset({"extra_forwards"}))
    config: NAGConfig

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        if self.config.scale == 1:
            return []
        return [layer for layer in layers if layer.is_cross] or layers  # joint attention has no others

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        return [block for block in blocks if self.config.scale > 1 and holds_text_apart(block)]

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.scale == 1:
            return next(call)
        self.ensure_outside(call)
        memory: Negative = call.shared
        memory.__init__()  # type: ignore[misc]  # an outer plugin may run the pipeline several times
        arguments = call.arguments()
        texts, guidance = for_each_prompt(self.name, self.said(call), arguments, "negative_prompt"), call.family.guidance
        asked = {**with_prompt(arguments, texts), **self.further(arguments), **{name: 1 for name in COPIES if name in arguments}}
        if guidance.layout != "none":
            asked[guidance.scale] = guidance.off  # else some want what the text is guided away from
        heard = own_conditioning(call.pipe, asked).of_branch.get("cond", {})
        if TEXT not in heard:
            raise Unsupported(f"nag: {type(call.pipe).__name__} was not heard to give its denoiser a text")
        memory.heard = heard
        return next(call)

    def said(self, call: RunCall) -> Any:
        """The negative text: the knob's, the call's own, or none."""
        if self.config.negative_prompt is not None:
            return self.config.negative_prompt
        if call.get("negative_prompt") is None and call.get("negative_prompt_embeds") is not None:
            raise ConfigError("plugin 'nag': negative_prompt = None: the call gives negative_prompt_embeds; say the negative one as text")
        return call.get("negative_prompt") or ""

    def further(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What the call says for its second and third text encoder, where its own negative text is taken."""
        if self.config.negative_prompt is not None:
            return {}
        told = {number: arguments.get(f"negative_prompt_{number}") for number in (2, 3)}
        return {
            f"prompt_{number}": for_each_prompt(self.name, text, arguments, f"negative_prompt_{number}")
            for number, text in told.items()
            if text is not None
        }

    def ensure_outside(self, call: RunCall) -> None:
        """Raises Unsupported where a plugin would read the widened call as something else, or keep what other rows gave."""
        if call.family.kind != "dit":
            return
        entries, joint = list(call.run.entries), is_joint(call.family)
        behind = entries[entries.index(call.entry) + 1 :]
        for entry in entries:
            effects = entry.plugin.effects
            if entry.plugin.is_neutral or entry is call.entry:
                continue
            past = "plain_gradients" in effects.needs or "denoiser" in effects.replaces
            other = joint and ("extra_forwards" in effects.needs or "conditioning" in effects.edits)
            if entry in behind and (past or other):
                what = "a denoiser past the other plugins' layers" if past else "the denoiser again, or for another text"
                raise Unsupported(f"nag: {entry.name} asks {what}; put {entry.name} before nag")
            if joint and effects.skips & {"blocks", "denoiser"} and (self.config.start, self.config.end) != (0, 1):
                raise Unsupported(
                    f"nag: start = {self.config.start}, end = {self.config.end}: {entry.name} keeps what steps before have computed, and "
                    f"with joint attention guided steps have more rows than others; guide all steps, or take {entry.name} off"
                )

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        memory, knobs, step = call.shared, self.config, call.step
        if not memory.heard or not self.acts(step.index, step.total) or "cond" not in call.texts:
            return next(call)  # type: ignore[no-any-return]
        call.count("guided")
        if is_joint(call.family):
            branch = call.branches[call.texts.index("cond")]
            tells = {k: v for k, v in memory.heard.items() if v.ndim > 1 and (knobs.pooled == "negative" or not k.startswith("pooled"))}
            wide = widened(call, branch, tells)
            memory.window = Beside(len(wide.branches), call.branches.index(branch), len(wide.sample))
        else:
            wide, memory.window = self.told_of_both(call)
        try:
            return next(wide)[: call.sample.shape[0]]  # type: ignore[no-any-return]
        finally:
            memory.window = None

    def acts(self, index: int, total: int) -> bool:
        """Whether step number ``index`` of so many is one of those between start and end.

        Raises:
            ConfigError: none is.
        """
        start, end = self.config.start, self.config.end
        chosen = [i for i in range(total) if start <= i / total < end]
        if not chosen:
            raise ConfigError(f"plugin 'nag': start = {start}, end = {end}: none of the {total} steps begins between them; widen them")
        return index in chosen

    def told_of_both(self, call: DenoiseCall) -> tuple[DenoiseCall, Window]:
        """For layers of cross-attention: the call that knows the negative text, and where they find it."""
        parts, at, text, heard = len(call.texts), call.texts.index("cond"), call[TEXT], call.shared.heard
        negative = as_rows(heard[TEXT], len(text) // parts).to(text)
        if call.family.kind != "dit":
            frames = call.sample.shape[2] if call.sample.ndim == 5 else 1  # of AnimateDiff, whose layers have a row for each
            return call, Window(parts, at, len(call.sample) * frames, negative)
        window = Window(parts, at, len(call.sample), None, text.shape[-2], negative.shape[-2])
        return call.replace(**self.lengthened(call, negative, parts)), window

    def lengthened(self, call: DenoiseCall, negative: Tensor, parts: int) -> dict[str, Tensor]:
        """The call's text and mask with the negative ones behind, in every part alike: those of the others are parted and not looked at."""
        text, mask, other, order = call[TEXT], call.get(MASK), call.shared.heard.get(MASK), call.family.guidance.order
        if mask is not None and len(mask) > len(text):  # guidance was cut off in mid-run, and SANA hands on the mask of both branches
            mask = mask.chunk(len(order))[order.index("cond")]
        changes = {TEXT: torch.cat([text, torch.cat([negative] * parts)], -2)}
        if mask is not None or other is not None:
            own = text.new_ones(len(text), text.shape[-2]) if mask is None else mask
            other = negative.new_ones(len(negative), negative.shape[-2]) if other is None else as_rows(other, len(negative))
            changes[MASK] = torch.cat([own, torch.cat([other.to(own)] * parts)], 1)
        return changes

    def block(self, call: BlockCall, next: Any) -> Any:
        window: Window | Beside | None = call.shared.window
        out = next(call)
        return with_one_picture(out, call.info.returns, window) if isinstance(window, Beside) else out

    def attention(self, call: AttentionCall, next: Any) -> Any:
        window: Window | Beside | None = call.shared.window
        if window is None:
            return next(call)
        knobs = self.config
        combine = partial(guided, scale=knobs.scale, tau=knobs.tau, alpha=knobs.alpha, norm=int(knobs.norm[1]))
        return ask_beside(call, next, window, combine) if isinstance(window, Beside) else ask_twice(call, next, window, combine)
