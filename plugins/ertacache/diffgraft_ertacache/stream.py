"""The residual stream of a DiT: what goes into its first block, and what all its blocks together add to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffgraft import BlockCall, DenoiseCall, blocks_of
from torch import Tensor

STREAM = "hidden_states"


def last_block(call: DenoiseCall) -> str:
    """The path of the block that ends the stack of the denoiser that is called."""
    blocks = blocks_of(call.family, {call.model_name: call.model})
    path: str = [block for block in blocks if not block.is_layer][-1].path
    return path


def sample_tokens(x: Tensor, start: Tensor, joined: str) -> slice:
    """Where the tokens of the first block are in a stream [batch, tokens, channels] that the model may have put the text into."""
    text = x.shape[1] - start.shape[1]
    return slice(text, x.shape[1]) if joined == "front" else slice(0, start.shape[1])


@dataclass
class Stream:
    """One denoiser call in progress, and the residual of the one that was last computed (of one guidance branch)."""

    tail: str | None = None
    """Path of the last block; None while this call is none of ours."""
    start: Tensor | None = None
    """What the first block got. Kept, because ControlNets add to the stream between blocks, and the residual holds that already."""
    replay: Tensor | None = None
    """The residual that stands for all blocks in this call, or None: they are computed."""
    residual: Tensor | None = None

    def begin(self, tail: str | None, replay: Tensor | None = None) -> None:
        """Before a denoiser call."""
        self.tail, self.start, self.replay = tail, None, replay

    def through(self, call: BlockCall, next: Any) -> Any:
        """One block's forward: computed, or its input handed on; the last one then adds the residual."""
        if self.tail is None:
            return next(call)
        x = call[STREAM]
        if self.start is None:
            self.start = x
        is_tail = call.info.path == self.tail
        returns, own = call.info.returns, sample_tokens(x, self.start, call.info.joined)
        if self.replay is None:
            out = next(call)
            if is_tail:
                self.residual = (out[returns.index(STREAM)] if isinstance(out, tuple) else out)[:, own] - self.start
            return out
        if is_tail:
            y = self.start + self.replay
            x = y if y.shape == x.shape else torch.cat([x[:, : own.start], y, x[:, own.stop :]], dim=1)
        return x if len(returns) == 1 else tuple(x if name == STREAM else call[name] for name in returns)
