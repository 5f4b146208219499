"""The knobs, and the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.published import Weights
from pydantic import Field, model_validator
from typing_extensions import Self

PAPER = Paper(
    title="Identifying and Solving Conditional Image Leakage in Image-to-Video Diffusion Model",
    arxiv="2406.15735",
    implemented="the inference strategy: a start at time M < T with Analytic-Init, for variance-preserving, EDM and flow models; measured "
    "on the model's own clips, on yours, or read from the authors' files",
    omitted="TimeNoise, the training strategy",
    licence="official code Apache-2.0, parts of it NVIDIA's non-commercial; written from the equations",
)


class CilStartConfig(PluginConfig):
    """Knobs of the late start."""

    start: float | None = Field(
        None,
        gt=0,
        le=1,
        description="M / T: where runs begin, a share of the training's time (of the noise level of flow models and of EDM's schedules); "
        "none: the authors' 0.94, and of EDM's schedules 1/7 (SVD: sigma 100 of 700)",
    )
    init: Literal["analytic", "plain"] = Field(
        "analytic", description="what they begin with: N(m, v I) nearest to the data at M (Analytic-Init), or the pipeline's own noise"
    )
    artefact: str | Path | Artefact | None = Field(
        None, description="E[x_0] and tr Cov[x_0] / d as `diffgraft calibrate` or `measured_on` found them; none: 0 and 1"
    )
    published: str | Path | Weights | None = Field(
        None, description="the authors' file for Stable Video Diffusion: a path, or 'owner/name/file' on the Hub"
    )
    formula: Literal["paper", "official"] = Field(
        "paper",
        description="'official': the start of the authors' SVD code, in which mean and variance change places; to compare, with a "
        "measured mean and variance on schedulers of SVD's and Euler's kind",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:  # before anything is fetched
        if self.artefact is not None and self.published is not None:
            raise ValueError("artefact and published both say mean and variance; give one of them")
        return self
