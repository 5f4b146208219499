"""Faster Diffusion: a U-Net's encoder runs at key steps only; the decoder of the steps between runs in one batch (arXiv 2312.09608).

At a non-key step the denoiser is called with the key step's noisy sample, so that ``conv_in``, whose output is the first skip
connection, repeats what it gave; down blocks and mid block answer with what they gave at the key step; the up blocks run with the fresh
timestep. So a non-key prediction does not depend on x_t, and those of all steps up to the next key can be made together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from diffgraft import (
    BlockCall,
    BlockInfo,
    Call,
    ControlCall,
    DenoiseCall,
    Effects,
    Family,
    Paper,
    Plugin,
    PluginConfig,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.predictions import is_exploding, is_flow
from pydantic import Field, field_validator
from torch import Tensor

from diffgraft_faster_diffusion.method import (
    ALPHA,
    Keys,
    Named,
    holds_tensors,
    inject,
    next_key,
    repeat_all,
    repeat_times,
    rows_of_step,
    same,
    versions,
)

__all__ = ["FasterDiffusion", "FasterDiffusionConfig"]
__version__ = "0.1.0"

WITH_ROWS = {"encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "encoder_attention_mask", "added_cond_kwargs",
             "added_time_ids", "down_block_additional_residuals", "mid_block_additional_residual"}  # fmt: skip
"""U-Net arguments whose tensors have one row (or one a frame) for every row of the sample."""


class FasterDiffusionConfig(PluginConfig):
    """Knobs of :class:`FasterDiffusion`."""

    keys: Keys = Field(
        "paper",
        description="t_key, the steps that run the encoder: 'paper', or a list of the official code ('100ls', '75ls', 's2', 'pro'); an "
        "interval (1 = every step: off); or a list of steps counted from 0, the first of the run, which always is one",
    )
    parallel: int | None = Field(
        None,
        ge=1,
        description="k: the most non-key steps that are decoded in one batch; 1 = one after the other; none = all up to the next key step, "
        "and 1 for videos (paper)",
    )
    noise: float | None = Field(
        None,
        ge=0,
        le=1,
        description="alpha of prior noise injection z_t + alpha z_T; 0 = none; none = 0.003 with variance-preserving schedulers, else 0",
    )
    noise_below: float = Field(
        0.5, ge=0, le=1, description="tau / T: noise is injected at t < tau, as a part of the training timesteps (paper: 25 of 50)"
    )
    noise_into: Literal["latents", "step"] = Field(
        "latents",
        description="'latents': encoder and scheduler get the noise (paper, official serial code); 'step': the scheduler only "
        "(official parallel code)",
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _keys(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and all(isinstance(key, int) and key >= 0 for key in value):
            return tuple(sorted({0, *value}))
        if value in get_args(Named) or (isinstance(value, int) and value >= 1):
            return value
        raise ValueError(
            f"allowed: {', '.join(map(repr, get_args(Named)))}, an interval of 1 or more steps, or a list of steps counted from 0"
        )


@dataclass
class Cache:
    """What one U-Net call of a step keeps until the next key step."""

    seen: Any = None
    next_key: int = 0
    """The ``scheduler.step`` call with which the next key step begins."""
    encoding: bool = False
    sample: Any = None
    """The U-Net's input at the key step."""
    features: dict[int, Any] = field(default_factory=dict)
    """By block: references to what it returned."""
    branches: int = 1
    m: int = 1
    """Steps in the batch that is being decoded."""
    reused: bool = False
    """Whether the encoder's features were asked for in this call."""
    freeu: bool = False
    """FreeU scales what enters the decoder in place, so the mid block's output is copied."""
    ready: dict[int, Any] = field(default_factory=dict)
    """By ``scheduler.step`` call: predictions that were made together with an earlier one's."""
    made_with: Any = None
    versions: tuple[int, ...] = ()


@dataclass
class Control:
    """What the ControlNet returned last, and for what."""

    residuals: Any = None
    seen: Any = None
    scale: Any = None
    place: int = -1
    next_key: int = 0


@dataclass
class Shared:
    """Kept in one run. Places are counts of ``scheduler.step`` calls."""

    place: int = -1
    number: int = 0
    caches: list[Cache] = field(default_factory=list)
    """For the first, second... U-Net call at one place (a plugin further out may ask often)."""
    serial: str = ""
    """Why this run decodes its steps one after the other."""
    control: Control = field(default_factory=Control)
    alpha: float | None = None
    initial: Any = None
    """z_T"""

    def begin(self, place: int) -> Cache:
        """The cache of the U-Net call that begins now."""
        if place < self.place:  # the schedule began again
            self.caches.clear()
        self.number = self.number + 1 if place == self.place and self.caches else 0
        self.place = place
        if self.number == len(self.caches):
            self.caches.append(Cache())
        return self.now

    @property
    def now(self) -> Cache:
        return self.caches[self.number]


class FasterDiffusion(Plugin):
    name = "faster_diffusion"
    paper = Paper(
        title="Faster Diffusion: Rethinking the Role of the Encoder for Diffusion Model Inference",
        arxiv="2312.09608",
        implemented="encoder propagation on U-Nets and their ControlNet, uniform and non-uniform; decoders of all steps up to the next "
        "key step in one batch; prior noise injection",
        omitted="transformers (the first 18 of DiT's 28 blocks as encoder), several GPUs for one picture, the official pipelines",
        licence="official code without a licence file; written from the paper's equations",
    )
    families = ("unets",)
    Config = FasterDiffusionConfig
    State = Shared
    neutral: ClassVar[dict[str, Any]] = {"keys": 1, "noise": 0}
    active: ClassVar[dict[str, Any]] = {"keys": 2, "parallel": 1, "noise": None}
    sessions = True
    effects = Effects(skips=frozenset({"blocks"}), edits=frozenset({"latents"}))
    tune: ClassVar[dict[str, Any]] = {"keys": (2, "paper", 3, 5), "noise": (0.0, None)}  # noise moves away from the plain pictures
    config: FasterDiffusionConfig

    def check(self, target: Target) -> None:
        for model in target.denoisers:
            kinds = {block.kind for block in target.blocks if block.model == model}
            if not {"down", "up"} <= kinds:
                raise Unsupported(
                    f"faster_diffusion: the family {target.family.name!r} lists blocks of the kinds {sorted(kinds)}; it needs a U-Net's "
                    "'down' (encoder) and 'up' (decoder) blocks"
                )
        self._ensure_preserving(target.pipe.scheduler, target.family)

    def _ensure_preserving(self, scheduler: Any, family: Family) -> None:
        """Raises Unsupported where noise was asked for that this scheduler's latents cannot take."""
        if self.config.noise and not is_preserving(scheduler, family):
            raise Unsupported(
                f"faster_diffusion: noise = {self.config.noise}: z_t + alpha z_T is meant for variance-preserving latents, but those of "
                f"{type(scheduler).__name__} have another scale; leave noise out or set it to 0, or use DDIM, DPM++ or PNDM"
            )

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """Encoder and bottleneck; what always runs carries no hook."""
        return [block for block in blocks if block.kind in {"down", "mid"}] if self.config.keys != 1 else []

    # the denoiser -----------------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        self._alpha(call)  # refuses before anything is computed
        if self.config.keys == 1:
            return next(call)
        i, sample = call.step.call, call.sample
        cache: Cache = call.shared.begin(i)
        seen = (call.model_name, call.branch, sample.shape, sample.dtype, sample.device)
        if not cache.features or seen != cache.seen or i >= cache.next_key:
            return self._encode(call, next, cache, seen)
        ready = cache.ready.pop(i, None)
        if ready is not None:
            untouched = versions(cache.made_with) == cache.versions
            if is_nominal(call) and untouched and same(others(call), cache.made_with):
                call.count("skipped")
                return rows_of_step(*ready)
            cache.ready.clear()
            call.shared.serial = "the U-Net got other arguments than at the step before"
        return self._decode(call, next, cache, seen)

    def _encode(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor], cache: Cache, seen: Any) -> Tensor:
        """A key step: the whole U-Net, whose encoder's outputs are kept."""
        cache.features.clear()  # first free the old ones
        cache.ready.clear()
        cache.made_with = cache.seen = None  # a forward that fails half-way leaves nothing to reuse
        cache.sample, cache.branches = call.sample, len(call.branches)
        cache.freeu = any(getattr(block, "s1", None) for block in getattr(call.model, "up_blocks", ()))
        cache.encoding = True
        call.count("computed")
        try:
            out = next(call)
        finally:
            cache.encoding = False
        cache.seen, cache.next_key = seen, self._next_key(call)
        return out

    def _next_key(self, call: Call) -> int:
        """The ``scheduler.step`` call with which the key step after this one begins; as many as there are where none is left."""
        step = call.step
        key = next_key(step.index, step.total, self.config.keys)
        return call.start_of(key).call if key < step.total else step.calls

    def _decode(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor], cache: Cache, seen: Any) -> Tensor:
        """The decoder at this place and, where they go together, at the m - 1 after it."""
        m = self._together(call, cache)
        i, branches, rows = call.step.call, cache.branches, cache.sample.shape[0]
        cache.m = m
        changes = {call.family.sample: cache.sample, **adapters_off(call)}
        if m == 1:
            cache.reused = False
            out = next(call.replace(**changes))
            if cache.reused:
                call.count("skipped")
                return out
            # a plugin further in answered by itself or asked another model, with what is not this step's sample
            return self._encode(call, next, cache, seen)
        of_rows = {name: value for name, value in call.arguments().items() if name in WITH_ROWS}
        changes = {name: repeat_all(value, branches, m) for name, value in (of_rows | changes).items()}
        times = torch.stack([call.step_at(k).t for k in range(m)]).to(cache.sample.device, non_blocking=True)
        out = next(call.replace(**changes, **{call.family.timestep: repeat_times(times, branches, rows)}))
        call.count("skipped")
        call.count("batches")
        cache.ready = {i + k: (out, branches, m, k) for k in range(1, m)}
        cache.made_with = others(call)
        cache.versions = versions(cache.made_with)
        return rows_of_step(out, branches, m, 0)

    def _together(self, call: DenoiseCall, cache: Cache) -> int:
        """How many places to decode now, this one included."""
        i, calls, shared, limit = call.step.call, call.step.calls, call.shared, self.config.parallel
        if limit is None:
            limit = calls if call.family.latents in {"bchw", "pixels"} else 1
        m = min(cache.next_key, calls, i + limit) - i
        if m > 1 and (serial := shared.serial or why_serial(call)):
            shared.serial = serial
            call.note(f"steps were decoded one after the other: {shared.serial}")
        return 1 if shared.serial else m

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        cache, info = call.shared.now, call.info
        copied = cache.freeu and info.kind == "mid"
        if cache.encoding:
            out = next(call)
            cache.features[info.order] = out.clone() if copied else out
            return out
        out, cache.reused = cache.features[info.order], True
        if cache.m > 1:
            return repeat_all(out, cache.branches, cache.m)
        return out.clone() if copied else out

    def control(self, call: ControlCall, next: Callable[[ControlCall], Any]) -> Any:
        """ControlNets run at key steps, and when their scale changes (guidance start and end); else the last residuals are given again."""
        if self.config.keys == 1:
            return next(call)
        kept: Control = call.shared.control
        i, sample, scale = call.step.call, call["sample"], call.get("conditioning_scale")
        seen = (call.model, sample.shape, sample.dtype, sample.device)
        due = seen != kept.seen or not kept.place <= i < kept.next_key
        if not due and same(scale, kept.scale):
            call.count("control_skipped")
            return kept.residuals
        call.count("control_computed")
        kept.seen = kept.residuals = None
        kept.residuals = next(call)
        kept.seen, kept.scale, kept.place = seen, scale, i
        if due:
            kept.next_key = self._next_key(call)
        return kept.residuals

    # prior noise ------------------------------------------------------------------------------------------------------------------

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        shared, step, config = call.shared, call.step, self.config
        if step.is_last:
            shared.caches.clear()  # the pipeline's decoder needs the memory
            shared.control = Control()
        alpha = self._alpha(call)
        if not alpha:
            return next(call)
        if step.call == 0:
            shared.initial = call.sample
        tau = config.noise_below * call.scheduler.config.num_train_timesteps
        if shared.initial is None or shared.initial.shape != call.sample.shape:
            call.note("prior noise was left out where the latents have another size than at the first step")
            return next(call)
        if config.noise_into == "step":
            return next(call if step.call == 0 else call.replace(sample=inject(call.sample, shared.initial, step.t, alpha, tau)))
        out = next(call)
        if step.is_last:
            return out
        # what the pipeline gets for z_{t-1} is what its next step gives to denoiser and scheduler
        return StepOutput(inject(out.sample, shared.initial, call.step_at(1).t, alpha, tau), out.x0)

    def _alpha(self, call: Call) -> float:
        """alpha of this run. The scheduler may be another one than at attaching."""
        shared, scheduler = call.shared, call.pipe.scheduler
        if shared.alpha is None:
            self._ensure_preserving(scheduler, call.family)
            shared.alpha = self.config.noise if self.config.noise is not None else ALPHA
            if shared.alpha and not is_preserving(scheduler, call.family):
                shared.alpha = 0.0
                call.note(f"no prior noise: the latents of {type(scheduler).__name__} are not variance-preserving")
        return shared.alpha  # type: ignore[no-any-return]


def is_preserving(scheduler: Any, family: Family) -> bool:
    """Whether latents are sqrt(abar) x_0 + sqrt(1 - abar) eps."""
    return not is_flow(family, scheduler) and hasattr(scheduler, "alphas_cumprod") and not is_exploding(scheduler)


def is_nominal(call: DenoiseCall) -> bool:
    """Whether the denoiser is given the scheduler's own timestep; its place in memory says so, no value is read."""
    t = call.timestep
    return isinstance(t, Tensor) and t.ndim == 0 and t.data_ptr() == call.step.t.data_ptr()


def others(call: DenoiseCall) -> dict[str, Any]:
    """All arguments but sample and timestep."""
    return {name: x for name, x in call.arguments().items() if name not in {call.family.sample, call.family.timestep}}


def adapters_off(call: DenoiseCall) -> dict[str, None]:
    """Changes that withhold T2I-Adapter residuals: they were added, partly in place, to the encoder's outputs, which are reused."""
    names = ["down_intrablock_additional_residuals"]
    if call.get("mid_block_additional_residual") is None:
        names.append("down_block_additional_residuals")  # the older way to pass them
    return {name: None for name in names if call.get(name) is not None}


def why_serial(call: DenoiseCall) -> str:
    """Why steps cannot share a batch here; "" where they can."""
    around = [
        other.name
        for other in call.others
        if {"denoise", "block", "attention", "modules"} & set(other.points()) or "weights" in other.effects.edits
    ]
    if around:
        return f"{', '.join(around)} works in the denoiser step by step"
    if call.family.guidance.bound:
        return "layers of this U-Net tell the guidance branches by their place in the batch"
    if not is_nominal(call):
        return "the U-Net is not given the scheduler's own timestep, so those of the next steps are not known"
    unknown = [name for name, value in others(call).items() if name not in WITH_ROWS and holds_tensors(value)]
    return f"it is not known how tensors in {', '.join(unknown)} belong to the rows of the batch" if unknown else ""
