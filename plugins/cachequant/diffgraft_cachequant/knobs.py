"""The knobs of CacheQuant, which its calibrator takes too."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from diffgraft import Paper
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.knobs import FLOAT, BitsConfig
from pydantic import Field

PAPER = Paper(
    title="CacheQuant: Comprehensively Accelerated Diffusion Models",
    arxiv="2503.01323",
    implemented="dynamic programming schedule, decoupled error correction of cache and quantisation, post-training quantisation",
    omitted="the optional reconstruction of blocks; attention's products (q k, softmax v) stay floats",
    licence="official code without a licence, read for facts; written from the equations",
)

CORRECTS_QUANTISATION = ("both", "quantisation")
"""Values of ``correct`` for which the output of quantised layers is corrected."""


class CacheQuantConfig(BitsConfig):
    """Knobs of CacheQuant."""

    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact"
    )
    interval: int = Field(
        5, ge=1, description="N: ceil(T/N) of T U-Net calls are whole; 1 is no cache. A calibration serves all N up to its own"
    )
    branch: int = Field(
        0, ge=0, description="number of the skip connection (conv_in's is 0) above which every step runs; larger is slower and closer"
    )
    schedule: Literal["dps", "uniform"] = Field(
        "dps",
        description="which calls are whole: dps, those for which the cached features are least wrong in sum; uniform, every N-th step",
    )
    correct: Literal["both", "cache", "quantisation", "off"] = Field(
        "both", description="DEC, a F + b for each channel: of the cached feature, of what the quantised layer makes of it, or both"
    )
    bits: str = Field("w8a8", description="bits of weights and activations, 2 to 16 each, or 32 for floats; w32a32: nothing is quantised")
    inputs: Literal["fixed", "dynamic"] = Field(
        "fixed", description="range of a quantised layer's inputs: fixed, that of the calibration at this U-Net call; dynamic, their own"
    )
    keep: tuple[str, ...] = Field((), description="layers that stay floats, by path or a part of it: conv_out, up_blocks.2, attn2.to_q")

    @property
    def quantises(self) -> bool:
        """Whether any layer is put on a grid."""
        return not self.is_off

    @property
    def caches(self) -> bool:
        """Whether any step skips."""
        return self.interval > 1

    @property
    def corrects_cache(self) -> bool:
        return self.caches and self.correct in ("both", "cache")

    @property
    def corrects_quantisation(self) -> bool:
        """Whether the output of the layers that read the cache is corrected: those of weights on a grid."""
        return self.weight_bits != FLOAT and self.correct in CORRECTS_QUANTISATION

    @property
    def is_measured(self) -> bool:
        """Whether anything of it was to be measured."""
        return self.quantises or self.corrects_cache or (self.caches and self.schedule == "dps")
