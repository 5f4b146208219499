"""Where the two halves of a U-Net's shortcuts meet: pure facts of channels, free of diffusers."""

from __future__ import annotations

from collections.abc import Sequence


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


def split_at(channels: int, skip: int) -> int:
    """Channels of the first part of a shortcut's input [what comes from below, what comes across] (section 4.2, equation 7).

    Raises:
        ValueError: what comes across is all of it, or more.
    """
    if not 0 < skip < channels:
        raise ValueError(f"{skip} of {channels} channels come across")
    return channels - skip


def kept_steps(total: int, timesteps: int) -> range:
    """The steps of a run that are calibrated on: each (total / timesteps)-th (algorithm 1)."""
    return range(0, total, max(total // timesteps, 1))
