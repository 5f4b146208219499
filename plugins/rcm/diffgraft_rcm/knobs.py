"""The knobs of rCM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from diffgraft import Paper, PluginConfig
from diffgraft.methods.published import Weights
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from diffgraft_rcm.method import SIGMA_MAX, TABLES, times_of

PAPER = Paper(
    title="Large Scale Diffusion Distillation via Score-Regularized Continuous-Time Consistency",
    arxiv="2510.08431",
    implemented="the few-step sampler with both published time tables, the published Wan weights, and a JVP-free discrete-time consistency "
    "distillation (dcm) of one's own",
    omitted="the paper's own training: continuous-time consistency by Jacobian-vector products, and the score regularisation",
    licence="official code Apache-2.0; written from its formulas",
)


class RCMConfig(PluginConfig):
    """Knobs of rCM."""

    times: Literal["quality", "first", "spread"] | tuple[float, ...] | None = Field(
        "quality",
        description="RF times t of the steps: a published table for up to 4 ('quality': .98765 .93378 .85290 .60898; 'first': .98765 "
        ".78271 .60898 .40622), 'spread' for any number, or falling numbers of your own; none: off, bit for bit",
    )
    sigma_max: float = Field(
        SIGMA_MAX, gt=0, le=1e6, description="tan(tau_0): noise to signal at the first time, of the tables; published: 80 (I2V: 200)"
    )
    guided: bool = Field(False, description="allow guidance above 1: distilled models have theirs learned in, and need none")
    weights: str | Path | list[str | Path] | Weights | None = Field(
        None, description="a published distilled Wan transformer, in place of the pipeline's: a file, or 'owner/name/file' on the Hub"
    )
    lora: str | Path | Mapping[str, str | Path | Mapping[str, Tensor]] | Mapping[str, Tensor] | None = Field(
        None, description="a LoRA that makes the model jump, such as `diffgraft fit rcm` learns: a file, or 'owner/name' on the Hub"
    )
    strength: float = Field(1.0, ge=0, le=2, description="by which the LoRA is multiplied")

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.times is not None:
            times_of(self.times, 1, self.sigma_max)
        if isinstance(self.times, tuple) and self.sigma_max != SIGMA_MAX:
            tables = ", ".join(map(repr, TABLES))
            raise ValueError(
                f"sigma_max = {self.sigma_max:g}: it is for {tables} and 'spread'; times of your own say themselves where a run begins: "
                "leave it out"
            )
        if self.weights is not None and self.lora is not None:
            raise ValueError("weights and lora: a LoRA is learned on the pipeline's own weights, and the published jump alone: give one")
        return self
