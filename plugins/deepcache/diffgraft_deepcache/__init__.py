"""DeepCache: a U-Net's deep features change little from step to step, so N-1 of N steps reuse them (Ma, Fang, Wang, arXiv 2312.00858).

A key step runs the whole U-Net and keeps one tensor, F_cache = U_{m+1}(.), the main-branch input of the up layer that takes skip connection
m (eq. 4). The steps after it run only what lies above: the down path as far as connection m and the up path from there, with
concat(D_m(.), F_cache) as input (eq. 5). Every module below hands out a stand-in of the right shape, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffgraft import BlockCall, BlockInfo, ConfigError, DenoiseCall, Effects, Paper, Plugin, PluginConfig, Target
from pydantic import Field
from torch import Tensor

from diffgraft_deepcache.layout import bypassed, connection_numbers
from diffgraft_deepcache.schedule import nonuniform_keys

__all__ = ["DeepCache"]
__version__ = "0.1.0"


class DeepCacheConfig(PluginConfig):
    """Knobs of DeepCache."""

    interval: int = Field(
        3, ge=1, description="N of 1:N inference (eq. 6): one step in N runs the whole U-Net; 1 is off (`cache_interval` of the package)"
    )
    branch: int = Field(
        0,
        ge=0,
        description="m - 1 of the paper's skip branch m: the number of the skip connection (conv_in's is 0) above which every step runs; "
        "larger is slower and closer (`cache_branch_id` of the package: 3 b + l where blocks have two layers)",
    )
    skip_mode: Literal["uniform", "nonuniform"] = Field(
        "uniform", description="uniform: every N-th step (eq. 6); nonuniform: ceil(T/N) steps, denser around `center` (eq. 7)"
    )
    power: float = Field(
        1.4, gt=1, le=10, description="p of eq. 7: how much denser around the center; lowered in steps of 0.02 until the steps are distinct"
    )
    center: int = Field(15, ge=0, description="c of eq. 7: the step around which key steps are densest (paper, SD 1.5: 10 to 20 of 50)")


@dataclass
class Cache:
    """What one U-Net call of a step keeps until the next: one feature tensor, and stand-ins without memory of their own."""

    last: int = -1
    seen: Any = None
    whole: bool = True
    in_place: bool = False
    thin: bool = True
    """Whether nothing is added to what blocks return, so that stand-ins need no channels."""
    feeder: int = -1
    feature: Any = None
    stand_ins: dict[int, Any] = field(default_factory=dict)


@dataclass
class Caches:
    """Of one guidance branch in one run: a cache for the first, second... U-Net call of a ``scheduler.step`` (a plugin may ask often)."""

    place: int = -1
    number: int = 0
    of_call: list[Cache] = field(default_factory=list)

    def begin(self, place: int) -> Cache:
        """The cache of the U-Net call that begins now, for this ``scheduler.step`` call."""
        if place < self.place:  # the schedule began again
            self.of_call.clear()
        self.number = self.number + 1 if place == self.place and self.of_call else 0
        self.place = place
        if self.number == len(self.of_call):
            self.of_call.append(Cache())
        return self.of_call[self.number]

    @property
    def now(self) -> Cache:
        return self.of_call[self.number]


class DeepCache(Plugin):
    name = "deepcache"
    paper = Paper(
        title="DeepCache: Accelerating Diffusion Models for Free",
        arxiv="2312.00858",
        implemented="1:N inference, uniform (eq. 6) and non-uniform (eq. 7), with every skip branch, on the U-Nets of diffusers",
        omitted="the authors' patched pipelines (their schedule without a center is center=0 here); U-Nets with an image-sized second path",
        licence="official code Apache-2.0; written from the paper's equations",
    )
    families = ("unets",)
    Config = DeepCacheConfig
    State = Caches
    neutral = {"interval": 1}  # noqa: RUF012
    active = {"interval": 2}  # noqa: RUF012
    effects = Effects(skips=frozenset({"blocks"}))
    tune = {"interval": (2, 3, 5), "branch": (1, 0)}  # noqa: RUF012
    config: DeepCacheConfig

    def check(self, target: Target) -> None:
        for model in target.denoisers:
            blocks = [block for block in target.blocks if block.model == model]
            numbers = connection_numbers(blocks)
            deepest = sorted(set(numbers.values()))[-2]  # the deepest branch with anything left below it
            if self.config.branch > deepest:
                raise ConfigError(f"plugin 'deepcache': branch = {self.config.branch}: this {model} allows 0 to {deepest}")

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """Only what skip steps leave out: a module that always runs carries no hook."""
        if self.config.interval == 1:
            return []
        models = dict.fromkeys(block.model for block in blocks)
        return [block for model in models for block in bypassed([b for b in blocks if b.model == model], self.config.branch)]

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.interval == 1:
            return next(call)  # type: ignore[no-any-return]
        step, sample = call.step, call.sample
        cache: Cache = call.state.begin(step.call)
        cache.in_place = edits_in_place(call)
        cache.thin = not cache.in_place and all(x is None for name, x in call.arguments().items() if "residual" in name)
        seen = (call.model_name, sample.shape, sample.dtype, sample.device, cache.thin)
        if cache.feature is None or seen != cache.seen:  # the first call, or guidance was cut in mid-run
            cache.whole = True
            cache.stand_ins.clear()
        else:
            cache.whole = self.is_due(step.index, cache.last, step.total)
        if cache.whole:
            cache.last, cache.feature = step.index, None  # first free the old one
        cache.seen = None  # a forward that fails half-way leaves nothing to reuse
        call.count("computed" if cache.whole else "skipped")
        out = next(call)
        cache.seen = seen
        return out  # type: ignore[no-any-return]

    def is_due(self, i: int, last: int, T: int) -> bool:
        """Whether step ``i`` of ``T`` runs the whole U-Net, which it did last at step ``last``: a key step does so once, at its start."""
        N, p, c = self.config.interval, self.config.power, self.config.center
        if self.config.skip_mode == "uniform":
            return i - last >= N  # eq. 6, and no feature grows older than N - 1 steps when a call is left out
        keys = nonuniform_keys(T, N, p, c)
        if keys is None:
            raise ConfigError(
                f"plugin 'deepcache': power = {p}, center = {c}: eq. 7 gives no {-(-T // N)} distinct key steps in {T} steps "
                f"at interval {N}; change one of them, or use skip_mode='uniform'"
            )
        return any(last < key <= i for key in keys)

    def block(self, call: BlockCall, next: Any) -> Any:
        cache: Cache = call.state.now
        order = call.info.order
        if cache.whole:
            out = next(call)
            if not call.info.kind.startswith("down"):  # the last one on the way up feeds the branch
                cache.feeder, cache.feature = order, fresh(out) if cache.in_place else out
            if order not in cache.stand_ins:
                cache.stand_ins[order] = stand_in(out, cache.thin)
            return out
        out = cache.feature if order == cache.feeder else cache.stand_ins[order]
        return fresh(out) if cache.in_place else out


def stand_in(out: Any, thin: bool) -> Any:
    """A block's output without its memory: no channels at all, so that concatenating it is free, or (not ``thin``) its whole shape."""
    if isinstance(out, Tensor):
        return out.new_empty((out.shape[0], 0, *out.shape[2:])) if thin and out.ndim >= 4 else out.new_zeros(()).expand(out.shape)
    return tuple(stand_in(part, thin) for part in out) if isinstance(out, tuple) else out


def fresh(out: Any) -> Any:
    """A copy that may be written to."""
    if isinstance(out, Tensor):
        return out.clone()
    return tuple(map(fresh, out)) if isinstance(out, tuple) else out


def edits_in_place(call: DenoiseCall) -> bool:
    """Whether this U-Net call writes into what blocks return: T2I-Adapter residuals are added, FreeU scales, in place."""
    adapter = call.get("down_intrablock_additional_residuals") is not None
    legacy = call.get("down_block_additional_residuals") is not None and call.get("mid_block_additional_residual") is None
    return adapter or legacy or any(getattr(b, "s1", None) for b in getattr(call.model, "up_blocks", ()))
