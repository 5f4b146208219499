"""What of a network can be left out, and what stands for it: a ResBlock's shortcut, the input of attention or of a transformer block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffgraft import BlockCall, BlockInfo
from diffusers.models.transformers.transformer_2d import Transformer2DModelOutput
from torch import Tensor, nn


def skippable(blocks: Sequence[BlockInfo]) -> list[BlockInfo]:
    """The L layers, in running order: ResBlocks and attention of a U-Net, whole blocks of a transformer."""
    with_layers = {(block.model, block.path.rsplit(".", 2)[0]) for block in blocks if block.is_layer}
    return [block for block in blocks if _is_skippable(block, (block.model, block.path) in with_layers)]


def _is_skippable(block: BlockInfo, has_layers: bool) -> bool:
    if not block.is_layer:
        return not has_layers and bool(block.returns) and set(block.returns) <= set(block.takes)
    return is_resblock(block.module) or block.kind.endswith(".attention")


def is_resblock(module: nn.Module) -> bool:
    """Whether it is a ResBlock: what it returns without its branch is known. One that only resamples is none."""
    return hasattr(module, "conv_shortcut") and hasattr(module, "output_scale_factor")


def skipped(call: BlockCall) -> Any:
    """What the block returns when it is left out."""
    info = call.info
    if not info.is_layer:
        kept = tuple(call[name] for name in info.returns)
        return kept if len(kept) > 1 else kept[0]
    x: Tensor = call[next(iter(call.names))]
    if is_resblock(info.module):
        return shortcut(info.module, x)
    if "return_dict" not in call.names:
        return x
    return Transformer2DModelOutput(sample=x) if call.get("return_dict", True) else (x,)


def shortcut(block: Any, x: Tensor) -> Tensor:
    """A ResBlock without its branch: x, resampled and projected where the block does that."""
    for resample in (getattr(block, "upsample", None), getattr(block, "downsample", None)):
        if resample is not None:
            x = resample(x)
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    return x / block.output_scale_factor  # type: ignore[no-any-return]
