"""The knobs of DPM-Solver-v3, which its calibrator takes too, and the schedulers that it can take the place of."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, Literal

from diffgraft import Family, Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.solvers import ode_settings
from pydantic import Field

from diffgraft_dpm_solver_v3.schedulers import DPMSolverV3Scheduler

PAPER = Paper(
    title="DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics",
    arxiv="2310.13268",
    implemented="the multistep predictor-corrector of orders 1 to 3 (4 with the pseudo-order corrector) as a scheduler, and the estimation "
    "of the statistics l, s, b on any pipeline",
    omitted="EDM's parametrisation (its models run as variance-preserving ones); classifier guidance",
    licence="official code MIT, read for facts; written from the equations",
)


class DPMSolverV3Config(PluginConfig):
    """Knobs of DPM-Solver-v3."""

    artefact: str | Path | Artefact | None = Field(
        None,
        description="the statistics l, s, b: a path, owner/name/file.safetensors on the Hub, or an Artefact; none: l = 1, s = b = 0, "
        "which is DPM-Solver++",
    )
    order: int = Field(
        2, ge=0, le=3, description="n + 1 of the predictor: 2 with guidance, 3 without (paper); 0 leaves the pipeline's own scheduler"
    )
    predictor: Literal["full", "pseudo"] = Field(
        "full", description="derivatives of g: of the polynomial through all points, or pseudo-order ones (paper: 5 steps on CIFAR-10)"
    )
    corrector: Literal["auto", "pseudo", "full", "off"] = Field(
        "auto", description="pseudo: of order n + 2; full: of order n + 1; auto: pseudo below 10 steps, else off (paper, Table 13)"
    )
    half: Literal["t<=0.5", "t>0.5"] | None = Field(
        None, description="correct only in half of the time: t<=0.5 as the paper and the README say, t>0.5 as the official code does"
    )
    lower_order_final: bool = Field(True, description="order at most k at the k-th step from the end")
    spacing: Literal["time", "quadratic", "logsnr", "edm"] = Field(
        "time",
        description="of the steps: uniform in t (as for Stable Diffusion; flow models: the pipeline's sigmas), sqrt(t), lambda, or EDM's",
    )
    final: Literal["sigma_min", "zero"] = Field(
        "sigma_min", description="where a run ends: at the least noise that the model was trained on (paper), or without noise (own)"
    )
    intervals: int = Field(
        250, ge=4, description="N: intervals of the lambda grid; calibrate measures at N + 1 points, a run interpolates what has another N"
    )
    ems_shape: Literal["full", "channel"] = Field(
        "channel", description="calibrate: l, s, b for each element of a sample (paper; binds to the size) or for each channel (own)"
    )
    draws: int = Field(1, ge=1, description="calibrate: draws of noise for each generated sample; K = samples x draws")
    delta: float = Field(
        0.01, gt=0, le=0.5, description="calibrate: step of the finite differences, in lambda and in units of sigma; 0.05 in half precision"
    )


def options(config: DPMSolverV3Config) -> dict[str, Any]:
    """The scheduler's settings."""
    same = ("predictor", "corrector", "half", "lower_order_final", "spacing", "final", "intervals")
    return {"solver_order": max(config.order, 1), **{name: getattr(config, name) for name in same}}


def settings_of(old: Any, family: Family) -> dict[str, Any]:
    """What a DPM-Solver-v3 scheduler takes over from ``old``.

    Raises:
        Unsupported: ``old`` is stochastic, belongs to a distilled model, clips its x0, or has a noise schedule that is not known here.
    """
    config = ode_settings("dpm_solver_v3", old, family)
    if family.prediction == "flow":
        config["prediction_type"] = "flow_prediction"
    known = inspect.signature(DPMSolverV3Scheduler.__init__).parameters
    return {key: value for key, value in config.items() if key in known}
