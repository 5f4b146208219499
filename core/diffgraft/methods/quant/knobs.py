"""The knob that says how many bits: "w4a8"."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from pydantic import Field, field_validator

from diffgraft.installed.config import PluginConfig
from diffgraft.methods.quant.affine import BITS, UniformAffine

FLOAT = 32
"""Bits of what is not quantised."""


def ensure_bits(value: int) -> int:
    """Raises ValueError for bits that no grid has."""
    if value not in (*BITS, FLOAT):
        raise ValueError(f"bits from {BITS[0]} to {BITS[-1]}, or {FLOAT} for floats")
    return value


class BitsConfig(PluginConfig):
    """Bits of weights and activations."""

    of_calibration: ClassVar[tuple[str, ...]] = ()
    """Knobs that only a calibration looks at: a run with its artefact needs none of them."""
    bits: str = Field(
        "w8a8", description="bits of weights and activations, 2 to 16 each, or 32 for floats: w8a8, w6a8, w4a8, w4a32; w32a32 is off"
    )

    @field_validator("bits", mode="before")
    @classmethod
    def _bits(cls, value: Any) -> Any:
        found = re.fullmatch(r"w([1-9]\d?)a([1-9]\d?)", value) if isinstance(value, str) else None
        if found is None or any(int(each) not in (*BITS, FLOAT) for each in found.groups()):
            raise ValueError(f"write wXaY with X and Y from {BITS[0]} to {BITS[-1]}, or {FLOAT} for floats")
        return value

    @property
    def weight_bits(self) -> int:
        return bits_in(self.bits)[0]

    @property
    def input_bits(self) -> int:
        return bits_in(self.bits)[1]

    @property
    def is_off(self) -> bool:
        """Whether everything stays floats."""
        return self.weight_bits == self.input_bits == FLOAT


def bits_in(plan: str) -> tuple[int, int]:
    """(bits of weights, bits of activations) of "w4a8"."""
    weights, inputs = plan[1:].split("a")
    return int(weights), int(inputs)


def weights_of(bits: int) -> UniformAffine | None:
    """The grid of weights of so many bits, one for each output channel; None for floats."""
    return None if bits == FLOAT else UniformAffine(bits, "channel")


def inputs_of(bits: int) -> UniformAffine | None:
    """That of activations, one for the whole tensor."""
    return None if bits == FLOAT else UniformAffine(bits, "tensor")
