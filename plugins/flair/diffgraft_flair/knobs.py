"""What FLAIR's user says."""

from __future__ import annotations

from pathlib import Path

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.problems import ProblemKnob
from pydantic import Field

PAPER = Paper(
    title="Solving Inverse Problems with FLAIR",
    arxiv="2506.02680",
    implemented="the variational loop over latents with deterministic trajectory adjustment, hard steps on the measurement and weights "
    "calibrated over t, for flow models",
    omitted="the tiny autoencoder in the loop (give the pipeline one), prompts by a captioner, several epochs, projections",
    licence="official code: its files name the MIT licence, the repository holds none; written from the formulas",
)


class FlairConfig(PluginConfig):
    """Knobs of FLAIR."""

    problem: ProblemKnob = Field(
        None, description="y = A(x) + noise: a Problem, or a dict of operator, y and noise; none: off, bit for bit"
    )
    artefact: str | Path | Artefact | None = Field(
        None, description="the model's loss over t, as `diffgraft calibrate` or `measured_on` found it; none: w(t) is `weight` at every t"
    )
    weight: float = Field(0.5, ge=0, le=1e3, description="scale of w(t), whose mean it is; 0: neither prior nor measurement move mu")
    subtract: bool = Field(False, description="take the calibrated w(0) off w(t), so that the last steps move less")
    lr: float = Field(1.0, ge=0, le=10, description="learning rate of the prior's step; with w(t) = 1 and 1 it sets mu to n - v")
    data_weight: float = Field(1.0, ge=0, le=1e6, description="lambda: of the measurement; 0: the prior alone")
    lr_data: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="learning rate of the steps on || A(D(mu)) - y ||^2; none: 0.1 / || A ||^2 (paper: 0.1 inpainting and deblurring, "
        "12 for 12 times smaller)",
    )
    data_steps: int = Field(15, ge=0, le=1000, description="most steps on the measurement after each of the prior's")
    enough: float | None = Field(
        None,
        ge=0,
        le=10,
        description="mean square of A(D(mu)) - y below which these steps stop, for each picture; none: the problem's noise squared, 1e-4 "
        "where it says none (paper: 1e-4, with noise of 0.01)",
    )
    adjust: float = Field(1.0, ge=0, le=1, description="alpha / (1 - t): how much of the noise is the model's own n_hat; 0: all of it new")
    t_min: float | None = Field(
        0.18, ge=0, lt=1, description="times go evenly from 1 down to it, both left out; none: the pipeline's own schedule"
    )
