"""How a model's weights are kept (plain, in 8 bits, quantised), and a few of their values, without copying or converting the rest."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)


def root_of(model: nn.Module) -> nn.Module:
    """The model itself where it is compiled."""
    return getattr(model, "_orig_mod", model)


def kept_as(weight: Tensor) -> str:
    """How one weight is kept: "" for plain numbers of 16 bits and more, else the dtype or the tensor class of a quantiser."""
    if type(weight) not in PLAIN:
        return type(weight).__name__
    return "" if weight.dtype.itemsize > 1 else str(weight.dtype).removeprefix("torch.")


def kept_by(model: nn.Module) -> str:
    """The same for a whole model: all that is not plain, "+" between them."""
    return "+".join(sorted({kept_as(weight) for weight in root_of(model).parameters()} - {""}))


def shape_of(weight: Any) -> tuple[int, ...]:
    """The shape that a weight stands for; bitsandbytes keeps two 4-bit numbers in a byte of a flat row."""
    state = getattr(weight, "quant_state", None)
    return tuple(getattr(state, "shape", None) or weight.shape)


def middle_of(weight: Tensor) -> int:
    """Where in its storage the middle value of a plain weight lies, whatever its strides."""
    place, offset = weight.numel() // 2, int(weight.storage_offset())
    for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        place, index = divmod(place, size)
        offset += index * stride
    return offset


def middle_value(weight: Any) -> float:
    """The middle value of any weight, dequantised; NaN where its class has no way to say it."""
    if type(weight) in PLAIN:
        return float(torch.as_strided(weight.detach(), (), (), middle_of(weight)).float())
    with contextlib.suppress(Exception):  # whatever a foreign tensor class raises means that it does not tell
        with torch.no_grad():
            values = plain_values(weight)
            return float(values.reshape(-1)[values.numel() // 2].float())
    return math.nan


def plain_values(weight: Any) -> Tensor:
    """All values of a weight that a quantiser, or a parallel run, keeps in a class of its own."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        maker = sys.modules[type(state).__module__]  # bitsandbytes.functional, which is loaded where it has made a weight
        return maker.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    for name in ("dequantize", "full_tensor"):
        if hasattr(weight, name):
            return getattr(weight, name)()  # type: ignore[no-any-return]
    return weight  # type: ignore[no-any-return]


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
