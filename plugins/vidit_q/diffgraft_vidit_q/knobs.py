"""The knobs of ViDiT-Q, which its calibrator takes too."""

from __future__ import annotations

import re
from pathlib import Path

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.affine import BITS
from pydantic import Field, field_validator

PAPER = Paper(
    title="ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video Generation",
    arxiv="2406.02540",
    implemented="weights per channel and activations per token, dynamic; channel balancing for ranges of timesteps; mixed precision",
    omitted="bits that change with the timestep, and the finished-video metrics (CLIPSIM, flow score, VQA) of the mixed-precision search",
    licence="official code without a licence, read for facts; written from the equations",
)
FLOAT = 32


class ViDiTQConfig(PluginConfig):
    """Knobs of ViDiT-Q."""

    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact; none: nothing is balanced"
    )
    bits: str = Field(
        "w8a8", description="bits of weights and activations, 2 to 16 each, or 32 for floats: w8a8, w6a8, w4a8, w4a32; w32a32 is off"
    )
    alpha: float = Field(0.3, ge=0, le=1, description="alpha of s = a^alpha / w^(1 - alpha); larger leaves less to the activations' grid")
    ranges: tuple[int, ...] = Field(
        (), description="last timesteps of the ranges that are balanced each by itself: (500,) is [0, 500] and [501, ...]; none: one range"
    )
    mixed: float = Field(0, ge=0, le=1, description="share of each kind of layer's weights that gets 8 bits: the most sensitive blocks'")
    symmetric: bool = Field(
        False, description="grids of the weights with zero in the middle, which integer kernels need; the paper's are not"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay floats beside the paper's, by path or a part of it: proj_out, blocks.0")

    @field_validator("bits")
    @classmethod
    def _bits(cls, value: str) -> str:
        found = re.fullmatch(r"w(\d+)a(\d+)", value)
        if found is None or any(int(each) not in (*BITS, FLOAT) for each in found.groups()):
            raise ValueError(f"write wXaY with X and Y from {BITS[0]} to {BITS[-1]}, or {FLOAT} for floats")
        return value

    @field_validator("ranges")
    @classmethod
    def _ranges(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or any(edge < 0 for edge in value):
            raise ValueError("timesteps rise, and none is below 0")
        return value

    @property
    def weight_bits(self) -> int:
        return int(self.bits[1:].partition("a")[0])

    @property
    def input_bits(self) -> int:
        return int(self.bits.partition("a")[2])

    @property
    def is_off(self) -> bool:
        """Whether everything stays floats."""
        return self.weight_bits == self.input_bits == FLOAT
