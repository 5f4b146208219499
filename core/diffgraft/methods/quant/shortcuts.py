"""Where the two halves of a U-Net's joined inputs meet: what comes from below, and what comes across by a skip connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.errors import Unsupported


def skip_channels(first: int, down: Sequence[tuple[Sequence[int], int | None]], up: Sequence[int]) -> list[list[int]]:
    """Channels that each residual block of the up blocks gets from the down blocks, last in first out.

    Args:
        first: channels of the first convolution's output.
        down: of each down block the channels of its residual blocks' outputs, and those of its sampler's (None: it has none).
        up: how many residual blocks each up block has.

    Raises:
        ValueError: the numbers of what is left behind and what is taken differ.
    """
    left = [first]
    for resnets, sampler in down:
        left += [*resnets, *([] if sampler is None else [sampler])]
    if len(left) != sum(up):
        raise ValueError(f"the down blocks leave {len(left)} tensors, the up blocks take {sum(up)}")
    return [[left.pop() for _ in range(count)] for count in up]


def from_below(unet: nn.Module, plugin: str) -> dict[str, int]:
    """Path of each residual block of the up blocks, in running order -> channels of its input that come from below, before those that come
    across.

    Raises:
        Unsupported: it cannot be told.
    """
    root: Any = root_of(unet)
    try:
        down = [([width(each, "out_channels") for each in block.resnets], sampler_channels(block)) for block in root.down_blocks]
        skips = skip_channels(root.conv_in.out_channels, down, [len(block.resnets) for block in root.up_blocks])
        found = {
            f"up_blocks.{i}.resnets.{j}": width(resnet, "in_channels") - skips[i][j]
            for i, block in enumerate(root.up_blocks)
            for j, resnet in enumerate(block.resnets)
        }
        if wrong := next((path for path, channels in found.items() if channels < 1), None):
            raise ValueError(f"nothing comes from below in {wrong}")
    except (AttributeError, ValueError) as error:
        raise Unsupported(f"{plugin}: which channels of {type(root).__name__}'s up blocks come across cannot be told ({error})") from error
    return found


def width(resnet: Any, name: str) -> int:
    """Channels that a residual block takes or gives; of one in space and time its spatial half says it."""
    return int(getattr(resnet if hasattr(resnet, name) else resnet.spatial_res_block, name))


def sampler_channels(block: Any) -> int | None:
    """Channels that a down block's sampler gives; None: it has none."""
    samplers = getattr(block, "downsamplers", None)
    return int(samplers[-1].out_channels) if samplers else None
