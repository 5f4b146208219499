"""The knobs of ViDiT-Q, which its calibrator takes too."""

from __future__ import annotations

from pathlib import Path

from diffgraft import Paper
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.knobs import BitsConfig
from pydantic import Field, field_validator

PAPER = Paper(
    title="ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers for Image and Video Generation",
    arxiv="2406.02540",
    implemented="weights per channel and activations per token, dynamic; static-dynamic channel balancing: scales for ranges of timesteps, "
    "and a Hadamard rotation; mixed precision",
    omitted="bits that change with the timestep, and the finished-video metrics (CLIPSIM, flow score, VQA) of the mixed-precision search",
    licence="official code without a licence, read for facts; written from the equations",
)


class ViDiTQConfig(BitsConfig):
    """Knobs of ViDiT-Q."""

    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact; none: nothing is balanced"
    )
    alpha: float = Field(0.3, ge=0, le=1, description="alpha of s = a^alpha / w^(1 - alpha); larger leaves less to the activations' grid")
    rotate: bool = Field(
        False, description="rotate inputs and weights (randomised Hadamard) after the balance: nearer at 8 bits, not surely at fewer"
    )
    ranges: tuple[int, ...] = Field(
        (), description="last timesteps of the ranges that are balanced each by itself: (500,) is [0, 500] and [501, ...]; none: one range"
    )
    mixed: float = Field(0, ge=0, le=1, description="share of each kind of layer's weights: the most sensitive blocks that fit get 8 bits")
    symmetric: bool = Field(
        False, description="grids of the weights with zero in the middle, which integer kernels need; the paper's are not"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay floats beside the paper's, by path or a part of it: attn.to_q, ff")

    @field_validator("ranges")
    @classmethod
    def _ranges(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if list(value) != sorted(set(value)) or any(edge < 0 for edge in value):
            raise ValueError("timesteps rise, and none is below 0")
        return value
