"""The knobs of LATINO and LVTINO."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any, Literal

from diffgraft import Paper, PluginConfig
from diffgraft.methods.problems import ProblemKnob
from diffusers import DiffusionPipeline
from pydantic import Field, field_validator

PAPER = Paper(
    title="LVTINO: LAtent Video consisTency INverse sOlver for High Definition Video Restoration",
    arxiv="2510.01339",
    implemented="the proximal few-step solver for pictures (LATINO, 2503.12615) and for videos, with the image model's step on each frame",
    omitted="prompt optimisation (LATINO-PRO), the temporal TV of the temporal super-resolution, the warm start by VIDUE, JPEG",
    licence="official code of LVTINO: none said, of LATINO-PRO: MIT; written from the formulas",
)
Several = float | tuple[float, ...]
"""One number, or one a step; the last goes on."""


class LvtinoConfig(PluginConfig):
    """Knobs of LATINO and LVTINO."""

    problem: ProblemKnob = Field(
        None, description="y = A(x) + noise, A linear: a Problem, or a dict of operator, y and noise; none: off, bit for bit"
    )
    delta: Several = Field(
        1.0,
        description="delta > 0 of gamma = delta (1 - abar) / noise^2, where gamma is not said: trust in the measurement; one number, or "
        "one a step (the last goes on)",
    )
    gamma: Several | None = Field(
        None, description="gamma > 0 of the proximal steps, in place of delta's rule: one number, or one a step (the last goes on)"
    )
    start_gamma: float = Field(200.0, gt=0, le=1e12, description="gamma_0 of the start prox(0; y); paper's code: 200")
    times: tuple[float, ...] | None = Field(
        None,
        description="tau_k: falling timesteps of the steps in the scheduler's numbers (of flow models 1000 times the level); none: the "
        "pipeline's own. Published: 757, 522, 375, 255, 125 (CausVid), 999, 874, 749, 624, 499, 374, 249, 124 (DMD2)",
    )
    end: Literal["prediction", "prox"] | None = Field(
        None,
        description="the result: the model's last prediction, or that after one more proximal step; none: as published, the prediction for "
        "videos, the proximal step for pictures",
    )
    encoding: Literal["plain", "difference"] = Field(
        "plain",
        description="plain: z = E(x_hat), the papers'; difference: z = z0 + E(x_hat) - E(D(z0)), so that what the autoencoder loses of a "
        "prediction stays; one encoding more a step",
    )
    guided: bool = Field(False, description="allow guidance above 1: few-step models have theirs learned in, and need none")
    few_step: bool = Field(False, description="the weights, or a LoRA on them, are known to be distilled: leaves the remark out")
    image: Any = Field(
        None,
        description="a few-step picture pipeline (SD, SDXL, LCM) whose step on each frame comes before each later step: a bundled name, a "
        "folder, a Hub id or a live one; none: no such step",
    )
    image_gamma: Several | None = Field(None, description="gamma of the proximal step after the image model's; none: delta's rule")
    image_times: tuple[int, ...] | None = Field(
        None,
        description="timesteps of the image model from the second step on (the last goes on); none: where its noise to signal is that of "
        "the step which follows. Published: 374, 249, 124, 124 (DMD2)",
    )
    image_prompt: str | tuple[str, ...] | None = Field(
        None, description="text for the image model, one or one a prompt; none: the run's own (published: 'a high resolution photo')"
    )

    @field_validator("delta", "gamma", "image_gamma")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        several = value if isinstance(value, tuple) else () if value is None else (value,)
        if value is not None and (not several or not all(0 < each <= 1e12 for each in several)):  # refuses nan too
            raise ValueError("numbers above 0 and up to 1e12, one or one a step")
        return value

    @field_validator("image")
    @classmethod
    def _named_or_live(cls, value: Any) -> Any:
        if value is not None and not isinstance(value, (str, os.PathLike, DiffusionPipeline)):
            raise ValueError("give a bundled name, a folder, a Hub id or a live diffusers pipeline")
        return value

    @field_validator("times", "image_times")
    @classmethod
    def _falling(cls, value: Any, info: Any) -> Any:
        falls = value is None or all(a > b or (a == b and info.field_name == "image_times") for a, b in pairwise(value))
        if value is not None and (not value or not falls or not all(0 <= t <= 1e6 for t in value)):
            raise ValueError("falling timesteps, at least one, none below 0")
        return value


def idle_knobs(config: LvtinoConfig) -> list[str]:
    """The knobs that were set and that another one leaves without effect."""
    alone = config.image is None
    idle = [name for name in ("image_gamma", "image_times", "image_prompt") if alone and getattr(config, name) is not None]
    if "delta" in config.model_fields_set and config.gamma is not None and (alone or config.image_gamma is not None):
        idle.append("delta")
    return idle


def too_long(config: LvtinoConfig, steps: int, end: str) -> list[str]:
    """Which lists have values that a run of so many steps does not come to, as "gamma (5 values, 3 are used)"."""
    proximal = steps if end == "prox" else steps - 1
    reach = {"gamma": proximal, "delta": proximal if config.gamma is None else 0}
    if config.image is not None:  # from the second step on
        reach |= {"image_gamma": steps, "image_times": steps - 1}
        reach["delta"] = steps if config.image_gamma is None else reach["delta"]
    found = {name: value for name in reach if isinstance(value := getattr(config, name), tuple)}
    return [f"{name} ({len(value)} values, {reach[name]} are used)" for name, value in found.items() if len(value) > reach[name] > 0]
