"""The knobs of ZOODiP, of the plugin and of its fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.knobs import BitsConfig
from pydantic import Field, model_validator

PAPER = Paper(
    title="Efficient Personalization of Quantized Diffusion Model without Backpropagation",
    arxiv="2503.14868",
    implemented="zeroth-order textual inversion, subspace gradient, partial uniform timestep sampling, on quantised denoisers",
    omitted="several vectors for a token; comprehensive captions are the user's to write",
    licence="official code without a licence, read for facts; written from the equations",
)


class ZOODiPConfig(PluginConfig):
    """Knobs of ZOODiP."""

    artefact: str | Path | Artefact | None = Field(None, description="what `fit` learned: a path, owner/name/file.safetensors on the Hub")
    word: str = Field("", description="word of the prompts in whose place the token comes; empty: prompts that name the token themselves")
    taught: bool = Field(True, description="whether the pipeline is taught the token in its runs; false is off")


class FitConfig(BitsConfig):
    """Knobs of the fit."""

    token: str = Field("<zoodip>", min_length=1, pattern=r"^\S+$", description="how prompts name what is learned")
    initial: str = Field("", description="word, one token, with whose row it begins; empty: the mean of all rows")
    template: str = Field("a photo of {}", pattern=r"\{\}", description="caption of pictures without one; {} is the token")
    rate: float = Field(1e-2, gt=0, description="learning rate of Adam (betas 0.9, 0.999, epsilon 1e-3)")
    directions: int = Field(2, ge=1, description="n: perturbations a step; a step takes n + 1 forwards")
    together: bool = Field(False, description="whether the n + 1 forwards of a step are one of n + 1 times the batch: faster, more memory")
    mu: float = Field(1e-3, gt=0, description="size of a perturbation")
    nu: float = Field(1e-3, ge=0, lt=1, description="share of the history's variance whose directions are left out; 0: none is")
    tau: int = Field(128, ge=2, description="steps of the history, after which its directions are found anew")
    first: int = Field(500, ge=0, description="least timestep that is drawn, of the model's training (1000)")
    last: int = Field(899, ge=0, description="largest")
    bits: str = Field("w8a32", description="bits of the denoiser's weights and inputs while it learns; w32a32: as it is")

    @model_validator(mode="after")
    def _times(self) -> Any:
        if self.first > self.last:
            raise ValueError(f"first = {self.first} is after last = {self.last}")
        return self
