"""A-STAR: objects whose attention maps overlap are lost, and so are maps that fade; two losses keep them apart and alive.

(Agarwal, Karanam, Joseph, Saxena, Goswami, Srinivasan, arXiv 2306.14544.) Before every step the latents take a gradient step on both losses
of the conditional branch's cross-attention maps, z_t' = z_t - alpha_t grad_z (L_seg + L_ret), and the step goes on from z_t'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from diffgraft import AttentionCall, AttentionInfo, DenoiseCall, Effects, Paper, Plugin, PluginConfig, RunCall
from diffgraft.methods.gradients import LossScale, latent_gradient, predict_alone
from diffgraft.methods.predictions import is_exploding
from pydantic import Field, field_validator
from torch import Tensor

from diffgraft_a_star.maps import Collector, Enough, choose, side_lengths, token_weights
from diffgraft_a_star.method import binarised, concept_maps, retention, segregation, sharpened, smoothed, step_size
from diffgraft_a_star.tokens import Indices, find, tokenizer_of

__all__ = ["AStar"]
__version__ = "0.1.0"


class AStarConfig(PluginConfig):
    """Knobs of A-STAR."""

    objects: tuple[str | int | tuple[int, ...], ...] | None = Field(
        None,
        description="the concepts: words of the prompt ('cat face') or token indices (3 or (3, 4)); default: the nouns that the prompt "
        "joins by 'and'",
    )
    alpha: float = Field(
        20.0, ge=0, description="alpha_t at the first step: length of the gradient step, in latents of unit variance; 0 is off (the paper "
        "gives none: Attend-and-Excite's)"
    )  # fmt: skip
    alpha_end: float = Field(0.5, ge=0, le=1, description="alpha_t falls as the square root of a line from 1 to this (Attend-and-Excite's)")
    segregation: float = Field(1.0, ge=0, description="weight of L_seg, which keeps two concepts' maps apart (eq. 2)")
    retention: float = Field(1.0, ge=0, description="weight of L_ret, which keeps a concept's map where it was a step before (eq. 3)")
    threshold: Literal["mean", "half_max"] = Field(
        "mean", description="B_t: what of a map is to be retained, its pixels above their mean or above half their maximum"
    )
    last: int | None = Field(None, ge=1, description="number of steps, from the first on, that are corrected; none: every step (paper)")
    resolution: int | None = Field(
        None,
        ge=2,
        description="shorter side of the maps in pixels (paper: 16); default: the smallest of at least 16 that there is, else the largest",
    )
    sharpen: float | None = Field(
        None, gt=0, description="maps become a softmax over the words of so many times the attention; Attend-and-Excite: 100; none: the "
        "attention itself"
    )  # fmt: skip
    smoothing: float = Field(0.0, ge=0, le=3, description="width in pixels of a 3 x 3 Gaussian over each map; Attend-and-Excite: 0.5")
    checkpointing: bool = Field(False, description="less memory and more time: blocks are computed again for their gradient")

    @field_validator("objects", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        if isinstance(value, str) or (value is not None and not (isinstance(value, Sequence) and len(value))):
            raise ValueError("a list of words or token indices, as ['cat', 'dog']")
        return value


@dataclass
class Memory:
    """In one run: the concepts' tokens, which maps are used, and the masks of the step before."""

    concepts: list[list[Indices]] = field(default_factory=list)
    collector: Collector | None = None
    size: tuple[int, int] | None = None
    pixels: int | None = None
    last: int | None = None
    index: int = -1
    before: Tensor | None = None
    now: Tensor | None = None
    weights: Tensor | None = None
    losses: list[Tensor] = field(default_factory=list)
    scale: LossScale = field(default_factory=LossScale)

    def begin(self, index: int, size: tuple[int, int]) -> None:
        """Step ``index`` begins at latents of ``size``, or is asked for once more: the step before's masks are to be retained."""
        if index < self.index or index == 0 != self.index or size != self.size:  # the schedule began again, or goes on at another size
            self.before = self.now = self.weights = self.pixels = self.last = None
        elif index != self.index:
            self.before = self.now
        self.index, self.size = index, size


class AStar(Plugin):
    name = "a_star"
    paper = Paper(
        title="A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis",
        arxiv="2306.14544",
        implemented="both losses with their gradient step before every denoising step, for words or tokens of the prompt, each sample of a "
        "batch for itself",
        omitted="nothing of the method; its prompt sets with concepts chosen by hand",
        licence="no official code; written from the paper's equations, with Attend-and-Excite's step size where the paper gives none",
    )
    families = ("sd", "sdxl", "pixart")
    Config = AStarConfig
    State = Memory
    neutral: ClassVar[dict[str, Any]] = {"alpha": 0.0}
    active: ClassVar[dict[str, Any]] = {"objects": (2, (5, 6)), "alpha": 20.0}
    effects = Effects(edits=frozenset({"latents"}), needs=frozenset({"plain_gradients", "extra_forwards"}))
    config: AStarConfig

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        return [layer for layer in layers if layer.is_cross and self.config.alpha > 0]

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.alpha == 0:
            return next(call)
        memory: Memory = call.shared
        memory.concepts = find(call, self.config.objects)
        memory.losses.clear()
        result = next(call)
        if memory.losses:
            first, last = (float(losses.mean()) for losses in (memory.losses[0], memory.losses[-1]))
            call.note(f"mean loss {first:.4f} at the first corrected step, {last:.4f} at the last one")
        return result

    def attention(self, call: AttentionCall, next: Any) -> Any:
        collector: Collector | None = call.shared.collector
        if collector is not None:
            collector.look(call)
        return next(call)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        knobs, step = self.config, call.step
        if knobs.alpha == 0 or (knobs.last is not None and step.index >= knobs.last) or "cond" not in call.branches:
            return next(call)  # type: ignore[no-any-return]
        memory, z = call.shared, call.latents
        memory.begin(step.index, (z.shape[-2], z.shape[-1]))
        try:
            found = latent_gradient(call, lambda z: self.losses(call, z), checkpointing=knobs.checkpointing, scale=memory.scale)
        finally:
            memory.collector = None
        memory.losses.append(found.losses)
        call.count("gradient passes")
        alpha = step_size(knobs.alpha, knobs.alpha_end, step.index, step.total)
        gradient = found.gradient
        if is_exploding(call.pipe.scheduler) and step.sigma is not None:
            gradient = gradient * (1 + step.sigma.to(gradient, non_blocking=True) ** 2)  # alpha_t is meant for latents of unit variance
        return next(call.with_latents(z - alpha * gradient))  # type: ignore[no-any-return]

    def losses(self, call: DenoiseCall, z: Tensor) -> Tensor:
        """L [batch] of the conditional branch's maps at the latents ``z``; leaves the maps' masks for the next step."""
        knobs, memory = self.config, call.shared
        A = self.maps(call, z)
        there = memory.weights.sum(-1) > 0
        loss = 0 * A.sum((1, 2, 3)) + knobs.segregation * segregation(A, there)  # a single concept has no L_seg, but a gradient, of zeros
        if memory.before is not None and knobs.retention > 0:
            loss = loss + knobs.retention * retention(A, memory.before, there)
        memory.now = binarised(A.detach(), knobs.threshold)
        return loss

    def maps(self, call: DenoiseCall, z: Tensor) -> Tensor:
        """A [batch, M, h, w]."""
        knobs, memory = self.config, call.shared
        collector = memory.collector = Collector(memory.pixels, None if knobs.checkpointing else memory.last)
        try:
            predict_alone(call.only("cond").with_input(z))
        except Enough:
            pass
        finally:
            collector.closed = True
        if memory.pixels is None:
            memory.pixels = choose(collector.seen, memory.size, knobs.resolution)
            memory.last = collector.seen[memory.pixels].last
        P = collector.mean(memory.pixels)
        collector.seen.clear()
        if knobs.sharpen is not None:
            P = sharpened(P, knobs.sharpen, int(tokenizer_of(call.pipe).bos_token_id is not None))
        if memory.weights is None or memory.weights.shape[::2] != (P.shape[0], P.shape[2]):
            memory.weights = token_weights(memory.concepts, P.shape[0], P.shape[2]).to(P.device)
        A = concept_maps(P, memory.weights).unflatten(-1, side_lengths(memory.pixels, memory.size))
        return smoothed(A, knobs.smoothing) if knobs.smoothing > 0 else A
