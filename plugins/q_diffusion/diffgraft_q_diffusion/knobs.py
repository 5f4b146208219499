"""The knobs of Q-Diffusion, which its calibrator takes too."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from diffgraft import Paper
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.knobs import FLOAT, BitsConfig, ensure_bits
from pydantic import Field, field_validator

PAPER = Paper(
    title="Q-Diffusion: Quantizing Diffusion Models",
    arxiv="2302.04304",
    implemented="U-Nets on affine grids, rounding and activation scales learned block by block on calls of all timesteps; split shortcuts; "
    "quantised attention",
    omitted="nothing of the method; the paper's own models are not measured",
    licence="MIT; read for facts, written from the equations",
)
PLAN = ("bits", "softmax", "outside", "split", "keep")
"""Knobs that an artefact is made for."""


class QDiffusionConfig(BitsConfig):
    """Knobs of Q-Diffusion."""

    of_calibration: ClassVar[tuple[str, ...]] = ("timesteps", "iterations", "scale_iterations", "batch", "lr", "scale_lr")
    bits: str = Field(
        "w4a8", description="bits of weights and activations, 2 to 16 each, or 32 for floats: w8a8, w6a8, w4a8, w4a32; w32a32 is off"
    )
    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact; none: nothing is learned"
    )
    softmax: int = Field(
        8, description="bits of what the softmax of the attention gives, 2 to 16, or 32 for floats; the paper takes 16 for Stable Diffusion"
    )
    outside: int = Field(
        8, description="least bits of the layers outside of the blocks (first and last convolution, time embedding); the official code: 2"
    )
    split: bool = Field(True, description="two grids for the shortcuts of the up blocks: what comes from below, and what comes across")
    keep: tuple[str, ...] = Field((), description="layers that stay floats, by path or a part of it: conv_out, up_blocks.2")
    timesteps: int = Field(25, ge=1, description="of calibration: each (steps / timesteps)-th step of a run is kept; paper: 20 to 25")
    iterations: int = Field(20_000, ge=1, description="of calibration: steps in which a block's rounding is learned")
    scale_iterations: int = Field(5_000, ge=1, description="of calibration: steps in which a block's activation scales are learned")
    batch: int = Field(32, ge=1, description="of calibration: rows of a step")
    lr: float = Field(1e-3, gt=0, description="of calibration: learning rate of the rounding (Adam)")
    scale_lr: float = Field(4e-4, gt=0, description="of calibration: first learning rate of the scales (Adam, falls as a cosine)")

    @field_validator("softmax", "outside")
    @classmethod
    def _other_bits(cls, value: int) -> int:
        return ensure_bits(value)

    def weight_bits_of(self, inside: bool) -> int:
        """Of a layer's weights."""
        return self.weight_bits if inside or self.weight_bits == FLOAT else max(self.weight_bits, self.outside)

    def input_bits_of(self, inside: bool) -> int:
        """Of its inputs."""
        return self.input_bits if inside or self.input_bits == FLOAT else max(self.input_bits, self.outside)
