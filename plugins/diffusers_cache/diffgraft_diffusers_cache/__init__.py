"""diffusers' own caches as one plugin: First Block Cache, MagCache, TaylorSeer, SeaCache, PAB, FasterCache.

The hooks are diffusers' own objects, and what they decide and compute is theirs. What is ours is who calls them: not patched ``forward``s
that outlive the run, but the hook points of a stack, which know where a run begins, which of its steps and which guidance branch a
denoiser call is, and what size it has. Each run gets hooks of its own and each branch its state, and nothing is ever written to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from diffgraft import AttentionCall, BlockCall, BlockInfo, ConfigError, DenoiseCall, Effects, Family, Plugin, Target, Unsupported, root_of
from diffgraft.methods.solvers import place_in
from diffusers.hooks.hooks import CacheContext
from torch import Tensor

from diffgraft_diffusers_cache.cache import LITE, Cache, config_for, ensure_serves, made, volumes
from diffgraft_diffusers_cache.knobs import PAPER, STACK, DiffusersCacheConfig
from diffgraft_diffusers_cache.shadow import hooks_for

__all__ = ["DiffusersCache"]
__version__ = "0.1.0"


UNKNOWN = frozenset({
    "allegro", "anima", "bria", "chronoedit", "cogview3", "easyanimate", "hunyuan_dit", "hunyuan_dit_pag", "longcat_image",
    "longcat_image_edit", "ltx2", "ltx2_image", "lumina", "nucleus_moe", "ovis_image", "prx", "sana", "sana_pag", "sana_video", "skyreels",
    "skyreels_df",
})  # fmt: skip
"""Families whose blocks diffusers' registry does not know."""


@dataclass
class Kept:
    """Of a branch: its cache, for which denoiser and size it is, and which call was the last. Of the run: its times as numbers, whether it
    was found to be one that the method can serve, and what its branches share."""

    cache: Cache | None = None
    now: Cache | None = None
    """The cache while its denoiser call is in progress."""
    seen: Any = None
    at: int = -1
    served: bool = False
    lent: tuple[Any, Cache] | None = None
    """The last cache that was made, and for what: the next branch takes it too, where diffusers keeps the branches' states apart itself."""
    numbers: dict[str, tuple[Any, list[float]]] = field(default_factory=dict)


class DiffusersCache(Plugin):
    name = "diffusers_cache"
    paper = PAPER
    families = ("dits",)
    Config = DiffusersCacheConfig
    State = Kept
    neutral: ClassVar[dict[str, Any]] = {"method": "off"}
    active: ClassVar[dict[str, Any]] = {"method": "first_block", "threshold": 10.0}
    effects = Effects(skips=frozenset({"denoiser", "blocks", "branches"}), couples_batch=True)
    tune: ClassVar[Mapping[str, tuple[Any, ...]]] = {"method": ("first_block",), "threshold": (0.03, 0.05, 0.1, 0.2, 0.4)}
    config: DiffusersCacheConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        method = self.config.method
        skips = {"blocks"} | ({"branches"} if method == "faster" else set())
        if self.config.use_lite_mode:
            skips = {"denoiser"}
        if method == "off" or self.config.measures:
            skips = set()
        self.effects = Effects(skips=frozenset(skips), couples_batch=method in ("first_block", "sea"))
        inside = {"block"} if method in STACK else {"attention"} if method in ("pab", "faster") else {"block", "attention"}
        if method == "off" or self.config.use_lite_mode:
            inside = set()
        self.points = partial(tuple, ("denoise", *sorted(inside)))  # type: ignore[method-assign]

    @classmethod
    def claims(cls, family: Family) -> bool:
        """At every setting: all DiTs but those whose blocks diffusers' registry does not know (methods for layers take them too), and
        those that put the text into the stream on the way."""
        return super().claims(family) and family.name not in UNKNOWN and all(group.joined == "none" for group in family.blocks)

    @property
    def is_neutral(self) -> bool:
        """Whether it is off, whatever the other knobs are; asked at every run, so without building a config for it."""
        return self.config.method == "off"

    # which places are hooked --------------------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        if self.config.method == "off":
            return
        self.ensure_one_stream(target)
        for name, model in target.denoisers.items():
            try:
                hooks = hooks_for(self.config.method, model, config_for(self.config, Cache(), target.family))
            except (ValueError, IndexError) as error:  # a block that its registry does not know, no blocks at all
                raise Unsupported(
                    f"diffusers_cache: method = {self.config.method!r}: diffusers cannot put it on the {name} of "
                    f"{type(target.pipe).__name__}: {error} Methods 'taylorseer' and 'pab' go by layers, and need no block to be known"
                ) from error
            places = {plain_path(block.path) for block in target.blocks if block.model == name} | {""}
            places |= {plain_path(path) for path, module in root_of(model).named_modules() if callable(getattr(module, "processor", None))}
            if self.config.use_lite_mode:
                places.add(LITE)
                hooks = {path: hooks[path] for path in hooks if path == LITE}  # the blocks that give zeros are not run at all
            self.ensure_places(hooks, places, name, type(model).__name__)
        self.ensure_latents(target)

    @staticmethod
    def ensure_one_stream(target: Target) -> None:
        """Raises Unsupported where the model puts the text into the stream between its blocks."""
        if seam := next((block for block in target.blocks if block.joined != "none"), None):
            raise Unsupported(
                f"diffusers_cache: {type(target.pipe).__name__} puts the text into the stream before {seam.path}, so that its first block "
                "and its last one do not return the same, and diffusers' caches take the one from the other; use ertacache"
            )

    def ensure_places(self, hooks: Mapping[str, Any], places: set[str], name: str, model: str) -> None:
        """Raises ConfigError or Unsupported where diffusers would hook nothing, or something that no hook point reaches."""
        method, patterns = self.config.method, [key for key in type(self.config).model_fields if key.endswith("identifiers")]
        said = [key for key in patterns if getattr(self.config, key) is not None]
        if self.config.use_lite_mode and not hooks:
            raise Unsupported(
                f"diffusers_cache: use_lite_mode = True extrapolates what the layer {LITE!r} gives, and {model} (pipe.{name}) has none; "
                "set it to False and name layers in cache_identifiers"
            )
        if not hooks or (set(hooks) == {""} and method != "sea"):
            key = said[0] if said else "cache_identifiers" if method == "taylorseer" else "spatial_attention_block_identifiers"
            example = sorted({re.sub(r"\.\d+", ".*", path) for path in places - {""} if "attn" in path})
            value = getattr(self.config, key)
            raise ConfigError(
                f"plugin 'diffusers_cache': {key} = {value}: with method {method!r} this matches no layer of {model} (pipe.{name}), and "
                f"diffusers would cache nothing; give expressions for its layers, like {', '.join(map(repr, example)) or 'its blocks'}"
            )
        if unreached := sorted(set(hooks) - places):
            raise Unsupported(
                f"diffusers_cache: {unreached[0]} of {model} is neither a block, an attention layer nor one of the layers that its family "
                f"names, so no hook reaches it; these can be named: {', '.join(sorted(places - {''})[:12])}..."
            )

    def ensure_latents(self, target: Target) -> None:
        """Raises Unsupported where SeaCache has nothing to look at."""
        family = target.family
        if self.config.method != "sea":
            return
        if family.prediction != "flow":
            raise Unsupported(
                f"diffusers_cache: method 'sea' filters by a flow's sigma between 0 and 1, and {family.name} is no flow; use another method"
            )
        if self.config.raw_vision_callback is None and family.latents not in ("bchw", "bcfhw", "bfchw"):
            raise Unsupported(
                f"diffusers_cache: raw_vision_callback = None: method 'sea' compares latents as (C, T, H, W), and {family.name} packs them "
                "into tokens; give a function that unpacks them, or use another method"
            )

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        if self.config.method in STACK:
            return super().select_blocks(blocks)
        named = [*(self.config.cache_identifiers or ()), *(self.config.skip_predict_identifiers or ())]
        return [b for b in blocks if not has_processor(b) and any(re.fullmatch(pattern, plain_path(b.path)) for pattern in named)]

    # one run ------------------------------------------------------------------------------------------------------------------------------

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        kept: Kept = call.state
        step, x, method = call.step, call.sample, self.config.method
        if method == "off" or call.extra or step.call == kept.at:
            return next(call)  # type: ignore[no-any-return]  # asked again, by a plugin further out: no step of its own
        timesteps, times = self.numbers(call, "timesteps")
        at = place_in(timesteps, step.t)
        if at is None:  # a session at a level of the caller's own: calls that follow no path have nothing in common
            return next(call)  # type: ignore[no-any-return]
        seen = (call.model_name, x.shape, x.dtype, x.device)
        if kept.cache is None or seen != kept.seen or step.call < kept.at:  # the first call, guidance cut, another denoiser or window
            begin = at - step.call
            if not call.shared.served:
                ensure_serves(call, self.config, times[begin : begin + step.calls])
                call.shared.served = True
            kept.cache, kept.seen = self.cache_of(call, seen, times, begin), seen
        kept.at = step.call
        cache = kept.now = kept.cache
        cache.begin(times[at])
        if method == "sea":
            cache.latents = lambda: volumes(call)
            sigma = self.numbers(call, "sigmas")[1][at]
            cache.tell(CacheContext(call.branch or "cond", step_index=step.call, num_inference_steps=step.calls, sigma=sigma))
        else:
            cache.tell(cache.contexts[call.branch])
        try:
            out = cache.denoised(call, next)
        except BaseException:
            kept.cache = call.shared.lent = None  # a forward that fails half-way leaves nothing to reuse
            raise
        finally:
            kept.now = cache.latents = None
        cache.report(call)
        return out

    def cache_of(self, call: DenoiseCall, seen: Any, times: list[float], begin: int) -> Cache:
        """The cache for a branch that begins. Hooks take about a millisecond to be made, so branches that begin together share them."""
        at, lent = (*seen, call.step.call), call.shared.lent
        if lent is None or lent[0] != at or call.branch in lent[1].contexts or not self.config.keeps_branches:
            lent = call.shared.lent = at, made(call, self.config, times, begin)
        lent[1].enter(call.branch, call.step.call)
        return lent[1]

    def block(self, call: BlockCall, next: Any) -> Any:
        cache: Cache | None = call.state.now
        return next(call) if cache is None else cache.through(plain_path(call.info.path), call, next)

    def attention(self, call: AttentionCall, next: Any) -> Any:
        cache: Cache | None = call.state.now
        return next(call) if cache is None else cache.through(plain_path(call.info.path), call, next)

    def numbers(self, call: DenoiseCall, name: str) -> tuple[Tensor, list[float]]:
        """The scheduler's timesteps or sigmas, and as numbers: read once a run, where diffusers waits for the device in every layer."""
        tensor = getattr(call.pipe.scheduler, name)
        known = call.shared.numbers.get(name)
        if known is None or known[0] is not tensor:
            known = tensor, tensor.tolist()  # check: allow host_sync because it is read once a run
            call.shared.numbers[name] = known
        return known  # type: ignore[no-any-return]


def plain_path(path: str) -> str:
    """A module's path as it is where nothing is compiled."""
    return path.replace("_orig_mod.", "")


def has_processor(block: BlockInfo) -> bool:
    """Whether a layer is an attention layer, which the attention point reaches."""
    return callable(getattr(block.module, "processor", None))
