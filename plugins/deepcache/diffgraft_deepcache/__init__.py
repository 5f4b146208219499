"""DeepCache: a U-Net's deep features change little from step to step, so N-1 of N steps reuse them (Ma, Fang, Wang, arXiv 2312.00858).

A key step runs the whole U-Net and keeps one tensor, F_cache = U_{m+1}(.), the main-branch input of the up layer that takes skip connection
m (eq. 4). The steps after it run only what lies above: the down path as far as connection m and the up path from there, with
concat(D_m(.), F_cache) as input (eq. 5). Every module below hands out a stand-in of the right shape, which nothing reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from diffgraft import BlockCall, BlockInfo, ConfigError, DenoiseCall, Effects, Paper, Plugin, PluginConfig, Target
from diffgraft.methods.skips import Caches, bypassed, bypassing, ensure_branch, skipping
from pydantic import Field
from torch import Tensor

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
        ensure_branch(target.blocks, self.config.branch, self.name)

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        """Only what skip steps leave out: a module that always runs carries no hook."""
        return [] if self.config.interval == 1 else bypassed(blocks, self.config.branch, self.name)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.interval == 1:
            return next(call)  # type: ignore[no-any-return]
        return skipping(call, next, lambda cache: self.is_due(call.step.index, cache.last, call.step.total))

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
        return bypassing(call, next)
