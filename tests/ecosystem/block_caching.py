"""Block caching: what the middle of a U-Net adds changes slowly, so it is kept for some steps (Wimbauer et al., arXiv 2312.03209)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffgraft import BlockCall, BlockInfo, Effects, Paper, Plugin, PluginConfig
from pydantic import Field
from torch import Tensor

__version__ = "0.1.0"


class BlockCachingConfig(PluginConfig):
    """Knobs of block caching."""

    interval: int = Field(2, ge=1, description="N: the block is computed at every N-th step; 1 = always")


@dataclass
class BlockCachingState:
    """C(x, s) of the paper: what the block added last."""

    change: Tensor | None = None


class BlockCaching(Plugin):
    """F(x) = x + C, with C from the last computed step."""

    name = "block_caching"
    paper = Paper(
        title="Cache Me if You Can: Accelerating Diffusion Models through Block Caching",
        arxiv="2312.03209",
        implemented="a constant interval on the mid block",
        omitted="schedules from measured changes, and scale-shift adjustment",
        licence="written from the paper's equations",
    )
    families = ("sd",)
    Config = BlockCachingConfig
    State = BlockCachingState
    neutral: ClassVar[dict[str, Any]] = {"interval": 1}
    active: ClassVar[dict[str, Any]] = {"interval": 2}
    effects = Effects(skips=frozenset({"blocks"}))
    config: BlockCachingConfig

    def select_blocks(self, blocks: Sequence[BlockInfo]) -> Sequence[BlockInfo]:
        return [block for block in blocks if block.kind == "mid"]

    def block(self, call: BlockCall, next: Callable[[BlockCall], Any]) -> Any:
        x = call[call.info.takes[0]]
        if call.step.index % self.config.interval and call.state.change is not None:
            call.count("skipped")
            return x + call.state.change
        made = next(call)
        if self.config.interval > 1:
            call.state.change = made - x
        return made
