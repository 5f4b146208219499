"""Gradient estimation: DDIM with the noise prediction carried on from the step before (Permenter, Yuan, arXiv 2306.04848)."""

from __future__ import annotations

from typing import Any, ClassVar

from diffgraft import Effects, Family, Paper, Plugin, PluginConfig
from diffusers import DDIMScheduler
from pydantic import Field
from torch import Tensor

__version__ = "0.1.0"


class GEConfig(PluginConfig):
    """Knobs of gradient estimation."""

    gamma: float = Field(2.0, ge=1, le=3, description="gamma: eps = gamma eps_t + (1 - gamma) eps_(t+1); 1 = DDIM (paper: 2)")


def carried(now: Tensor, before: Tensor | None, gamma: float) -> Tensor:
    """The second-order estimate of the noise [B, ...] (eq. 13)."""
    return now if before is None else gamma * now + (1 - gamma) * before


class GEScheduler(DDIMScheduler):
    """DDIM on the carried prediction."""

    gamma = 1.0
    before: Tensor | None = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self.before = None
        super().set_timesteps(*args, **kwargs)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = carried(model_output, self.before, self.gamma)
        self.before = model_output
        return super().step(made, timestep, sample, *args, **kwargs)


class GradientEstimation(Plugin):
    """Replaces the scheduler by :class:`GEScheduler`."""

    name = "gradient_estimation"
    paper = Paper(
        title="Interpreting and Improving Diffusion Models from an Optimization Perspective",
        arxiv="2306.04848",
        implemented="the second-order estimate of the noise with DDIM's steps",
        omitted="the noise schedule of the paper",
        licence="written from the paper's equations",
    )
    families = ("sd",)
    Config = GEConfig
    neutral: ClassVar[dict[str, Any]] = {"gamma": 1.0}
    active: ClassVar[dict[str, Any]] = {"gamma": 2.0}
    scheduler = GEScheduler
    effects = Effects(replaces=frozenset({"scheduler"}))
    config: GEConfig

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if self.config.gamma == 1:
            return None
        new = GEScheduler.from_config(old.config)
        new.gamma = self.config.gamma
        return new
