"""The shape and one value of any weight, however a quantiser keeps it, without converting a whole model."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import Any

import torch
from torch import Tensor

from diffgraft.kernel.weights import PLAIN, middle_of


def shape_of(weight: Any) -> tuple[int, ...]:
    """The shape that a weight stands for; bitsandbytes keeps two 4-bit numbers in a byte of a flat row."""
    state = getattr(weight, "quant_state", None)
    return tuple(getattr(state, "shape", None) or weight.shape)


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
