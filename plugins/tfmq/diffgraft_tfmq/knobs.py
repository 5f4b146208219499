"""The knobs of TFMQ, which its calibrator takes too."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from diffgraft import Paper
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.knobs import BitsConfig
from pydantic import Field

PAPER = Paper(
    title="TFMQ-DM: Temporal Feature Maintenance Quantization for Diffusion Models",
    arxiv="2311.16503",
    implemented="temporal information aware reconstruction of the time path as one block; finite set calibration of input scales",
    omitted="reconstruction of the other blocks (BRECQ; they are rounded to the nearest on a searched grid), and grids of queries, keys, "
    "values and softmax",
    licence="Apache-2.0; written from the paper's equations",
)


class TFMQConfig(BitsConfig):
    """Knobs of TFMQ."""

    of_calibration: ClassVar[tuple[str, ...]] = ("iterations", "rounding")
    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact; none: nothing is learned"
    )
    bits: str = Field(
        "w4a8", description="bits of weights and activations, 2 to 16 each, or 32 for floats: w8a8, w4a8, w4a32; w32a32 is off"
    )
    iterations: int = Field(
        20_000, ge=0, description="of calibration: steps of Adam that learn the time path's rounding; 0 leaves it at the nearest"
    )
    rounding: float = Field(0.01, ge=0, description="of calibration: lambda of the rounding regulariser")
    scales: Literal["timesteps", "one"] = Field(
        "timesteps", description="scales of inputs for each calibrated timestep (finite set calibration), or one for all of them"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay floats beside the official code's, by path or a part of it: mid_block")
