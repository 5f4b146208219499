"""The knobs of PTQ4DM, which its calibrator takes too."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from diffgraft import Paper
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.knobs import FLOAT, BitsConfig
from pydantic import Field

PAPER = Paper(
    title="Post-training Quantization on Diffusion Models",
    arxiv="2211.15736",
    implemented="U-Nets on affine grids whose activation ranges are searched on calls at timesteps from a clamped normal distribution",
    omitted="QDrop's random dropping of activation rounding, and AdaRound, which the official demo leaves out too (`q_diffusion` has it)",
    licence="official code without a licence for its own part, read for facts; written from the paper",
)
PLAN = ("bits", "ends", "keep", "p")
"""Knobs that an artefact is made for."""


class PTQ4DMConfig(BitsConfig):
    """Knobs of PTQ4DM."""

    of_calibration: ClassVar[tuple[str, ...]] = ("timesteps", "mu", "sd", "draws", "official_compat")
    artefact: str | Path | Artefact | None = Field(
        None,
        description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact; none: each tensor's own range",
    )
    ends: int = Field(8, ge=2, le=16, description="least bits of the first and the last layer")
    keep: tuple[str, ...] = Field((), description="layers that stay floats, by path or a part of it: conv_out, up_blocks.2")
    p: float = Field(2.4, gt=0, description="a range is that of the least mean |x - x_q|^p, of weights too; 2 is the paper's mean square")
    timesteps: Literal["normal", "uniform"] = Field("normal", description="of calibration: how timesteps are drawn; normal is the paper's")
    mu: float = Field(0.4, ge=0, le=1, description="of calibration: the mean, as a share of the steps; 0 is the least noise")
    sd: float = Field(0.4, gt=0, description="of calibration: the standard deviation, likewise")
    draws: int = Field(1, ge=1, description="of calibration: timesteps drawn for a prompt; the paper draws one for each of 1024 samples")
    official_compat: bool = Field(
        False, description="of calibration: pair a state with the mirrored timestep, as the official code does; for comparison only"
    )

    def bits_of(self, bits: int, at_end: bool) -> int:
        """Of a layer, inside or at an end."""
        return max(bits, self.ends) if at_end and bits != FLOAT else bits
