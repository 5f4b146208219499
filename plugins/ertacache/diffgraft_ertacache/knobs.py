"""The knobs of ERTACache, which its calibrator takes too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from pydantic import Field

PAPER = Paper(
    title="ERTACache: Error Rectification and Timesteps Adjustment for Efficient Diffusion",
    arxiv="2508.21091",
    implemented="offline policy, trajectory-aware step sizes (flow-matching Euler) and closed-form error rectification, on DiTs",
    omitted="the sigmoid around the linear error model (its first-order form, which the closed form solves, is used instead)",
    licence="official code Apache-2.0, not read; written from the equations",
)


class ERTACacheConfig(PluginConfig):
    """Knobs of ERTACache."""

    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact"
    )
    threshold: float = Field(
        0.1, ge=0, description="lambda: a step reuses the last residual where its calibrated relative l1 error is below this; 0 is off"
    )
    phi: Literal["difference", "velocity", "off"] = Field(
        "difference",
        description="phi_i, what a reusing step's size is multiplied with: clip(1 - ||v~ - v|| / d, 0, 1) with d = ||v_i - v_{i-1}|| "
        "(difference, as the sources have it) or ||v_i|| (velocity); off is 1. Flow-matching Euler only",
    )
    rectify: bool = Field(True, description="whether v~ is corrected by the linear error model K, B")
    max_reuse: int = Field(8, ge=1, description="W: most steps in a row that reuse one residual; the calibration measures ages up to this")
    first: int = Field(1, ge=1, description="steps at the beginning that are always computed")
    last: int = Field(1, ge=0, description="steps at the end that are always computed")
