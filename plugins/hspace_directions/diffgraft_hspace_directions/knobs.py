"""The knobs, which the calibrator takes too, and the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from typing_extensions import Self

PAPER = Paper(
    title="Discovering Interpretable Directions in the Semantic Latent Space of Diffusion Models",
    arxiv="2303.11073",
    implemented="directions of h-space by PCA (each step's own or the whole trajectory's), by the denoiser's Jacobian at test time, as the "
    "difference of two groups, or given; added at every step, symmetrically or as Asyrp (arXiv 2210.10960)",
    omitted="h-space before and inside the mid block (after it is the authors' default), masks on the Jacobian's output, removal of one "
    "direction from another, the annotators of faces",
    licence="official code MIT; written from the equations",
)


def ensure_direction(given: Any) -> Any:
    """Raises ValueError for what is no finite tensor of a direction."""
    if given is None:
        return None
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim not in (3, 4, 5) or not bool(given.isfinite().all()):
        raise ValueError("a finite float tensor [C, H, W], [T, C, H, W] or [T, R, C, H, W] (in Python: not on the command line)")
    return given


class HSpaceDirectionsConfig(PluginConfig):
    """Knobs of hspace_directions."""

    strength: float = Field(1.0, ge=-1e4, le=1e4, description="gamma: what the direction is multiplied with; 0 is off")
    source: Literal["pca", "jacobian", "given", "random"] = Field(
        "pca",
        description="where n_t comes from: the artefact's principal component; the Jacobian d eps / d h of the picture that is being made; "
        "`direction`; 'random': a random direction, the control that any claim must be held against",
    )
    component: int = Field(0, ge=0, le=255, description="k: which component or singular vector, the strongest first")
    unit: Literal["own", "norm"] = Field(
        "own",
        description="what gamma counts: 'own': standard deviations of a component, singular values, `direction` as it is (random: "
        "the component's, so that it has the same norm at each step); 'norm': the norm of h_t itself, for any source",
    )
    mode: Literal["symmetric", "asyrp"] = Field(
        "symmetric",
        description="'symmetric': the step uses the edited prediction; 'asyrp': only for the clean sample P_t, the plain one for D_t; a "
        "second forward, DDIM or Euler",
    )
    branches: Literal["all", "cond"] = Field(
        "all", description="which halves of guidance are edited: all of them (authors' Stable Diffusion), or the conditional one"
    )
    begin: float = Field(0.0, ge=0, le=1, description="share of the run's steps at which the edit begins")
    end: float = Field(1.0, ge=0, le=1, description="and ends (Asyrp edits the first part only)")
    iterations: int = Field(5, ge=1, le=1000, description="of the Jacobian's power iteration at each step where it is taken")
    every: int = Field(1, ge=1, description="take the Jacobian at every n-th step and keep its direction between")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of random directions and the power iteration's start; the run's own generators are not touched"
    )
    components: int = Field(10, ge=1, le=256, description="K: components that a calibration keeps")
    over: Literal["step", "trajectory"] = Field(
        "step", description="what a calibration takes components of: h_t at each step by itself, or all steps' h together"
    )
    direction: Annotated[Any, AfterValidator(ensure_direction)] = Field(
        None,
        description="n for source = 'given': a tensor [C, H, W], one a denoiser call [T, C, H, W] (T = 1: for all), or of videos "
        "[T, frames, C, H, W]",
    )
    artefact: str | Path | Artefact | None = Field(
        None, description="the calibration file: a path, owner/name/file.safetensors on the Hub, or an Artefact"
    )

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.begin > self.end:
            raise ValueError(f"begin = {self.begin} lies behind end = {self.end}")
        if (self.source == "given") != (self.direction is not None):
            raise ValueError("source = 'given' and direction go together: give both or neither")
        return self


OF_A_CALIBRATION = frozenset({"artefact", "component", "components", "over"})
READS = {
    "pca": OF_A_CALIBRATION,
    "jacobian": frozenset({"component", "iterations", "every", "seed"}),
    "given": frozenset[str](),
    "random": frozenset({"seed"}),
}
"""source -> which of the knobs of some sources only it reads."""


def idle_knobs(config: HSpaceDirectionsConfig) -> list[str]:
    """The knobs that were set and that this source does not read."""
    reads = READS[config.source] | (OF_A_CALIBRATION if (config.source, config.unit) == ("random", "own") else set())
    return sorted((frozenset().union(*READS.values()) - reads) & config.model_fields_set)
