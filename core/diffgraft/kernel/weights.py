"""How a model's weights are kept (plain, in 8 bits, quantised), and a few of their values, without copying or converting the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffgraft.installed.anatomy import root_of

PLAIN = (Tensor, nn.Parameter)


def kept_as(weight: Tensor) -> str:
    """How one weight is kept: "" for plain numbers of 16 bits and more, else the dtype or the tensor class of a quantiser."""
    if type(weight) not in PLAIN:
        return type(weight).__name__
    return "" if weight.dtype.itemsize > 1 else str(weight.dtype).removeprefix("torch.")


def kept_by(model: nn.Module) -> str:
    """The same for a whole model: all that is not plain, "+" between them."""
    return "+".join(sorted({kept_as(weight) for weight in root_of(model).parameters()} - {""}))


def middle_of(weight: Tensor) -> int:
    """Where in its storage the middle value of a plain weight lies, whatever its strides."""
    place, offset = weight.numel() // 2, int(weight.storage_offset())
    for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        place, index = divmod(place, size)
        offset += index * stride
    return offset


@torch.no_grad()
def read(weights: Sequence[Tensor], offsets: Sequence[int]) -> list[float]:
    """One value of each plain weight, at an offset in its storage; one copy from the device for each dtype."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for weight, offset in zip(weights, offsets, strict=True):
        groups.setdefault((weight.dtype, weight.device), []).append(torch.as_strided(weight, (), (), offset))
    found: list[float] = []
    for (dtype, _), values in groups.items():
        stacked = torch.stack([value.view(torch.uint8) for value in values] if dtype.itemsize == 1 else values)
        found += stacked.tolist()
    return found
