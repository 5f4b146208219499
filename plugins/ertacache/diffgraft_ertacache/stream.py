"""The residual stream of a DiT: what goes into its first block, and what all its blocks together add to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffgraft import BlockCall, DenoiseCall, blocks_of
from torch import Tensor


def last_block(call: DenoiseCall) -> str:
    """The path of the block that ends the sample's stack in the denoiser that is called."""
    blocks = blocks_of(call.family, {call.model_name: call.model})
    path: str = [block for block in blocks if not block.is_layer and block.joined != "alone"][-1].path
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
    beside: Tensor | None = None
    """What the first block got of a companion (LTX-2: the sound's stream)."""
    beside_residual: Tensor | None = None
    """Of the companion, of the same step as ``residual``."""

    def begin(self, tail: str | None, replay: Tensor | None = None) -> None:
        """Before a denoiser call."""
        self.tail, self.start, self.replay = tail, None, replay

    def through(self, call: BlockCall, next: Any) -> Any:
        """One block's forward: computed, or its input handed on; the last one then adds the residual."""
        if self.tail is None or call.info.joined == "alone":  # blocks that refine the text
            return next(call)
        name = call.info.stream
        x = call[name]
        second = call.family.companion if call.family.companion in call.info.returns else None
        if self.start is None:
            self.start, self.beside = x, call.get(second)
        is_tail = call.info.path == self.tail
        returns, own = call.info.returns, sample_tokens(x, self.start, call.info.joined)
        if self.replay is None:
            out = next(call)
            if is_tail:
                self.residual = (out[returns.index(name)] if isinstance(out, tuple) else out)[:, own] - self.start
                self.beside_residual = None if second is None else out[returns.index(second)] - self.beside
            return out
        sound = call.get(second)
        if is_tail:
            y = self.start + self.replay
            x = y if y.shape == x.shape else torch.cat([x[:, : own.start], y, x[:, own.stop :]], dim=1)
            sound = None if second is None else self.beside + self.beside_residual
        streams = {name: x, second: sound}
        return x if len(returns) == 1 else tuple(streams[each] if each in streams else call[each] for each in returns)
