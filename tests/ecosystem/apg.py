"""APG: guidance without its oversaturating part (Sadat, Hilliges, Weber, arXiv 2410.02416)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffgraft import Effects, GuideCall, Paper, Plugin, PluginConfig
from pydantic import Field
from torch import Tensor

__version__ = "0.1.0"


class APGConfig(PluginConfig):
    """Knobs of APG."""

    eta: float = Field(0.0, ge=0, le=1, description="eta: share of the parallel part that is kept; 1 = classifier-free guidance")


def project(delta: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of ``delta`` [B, ...] parallel and orthogonal to ``onto`` [B, ...], per sample (eq. 8)."""
    d, v = delta.flatten(1).double(), onto.flatten(1).double()
    parallel = ((d * v).sum(1, keepdim=True) / (v * v).sum(1, keepdim=True).clamp_min(1e-12) * v).to(delta.dtype).reshape(delta.shape)
    return parallel, delta - parallel


class APG(Plugin):
    """w-guidance with only eta of what lies along the conditional prediction."""

    name = "apg"
    paper = Paper(
        title="Eliminating Oversaturation and Artifacts of High Guidance Scales in Diffusion Models",
        arxiv="2410.02416",
        implemented="the projection (eq. 7 and 8) on predictions",
        omitted="norm rescaling and reverse momentum",
        licence="written from the paper's equations",
    )
    families = ("sd",)
    Config = APGConfig
    neutral: ClassVar[dict[str, Any]] = {"eta": 1.0}
    active: ClassVar[dict[str, Any]] = {"eta": 0.0}
    effects = Effects(edits=frozenset({"prediction"}))
    config: APGConfig

    def guide(self, call: GuideCall, next: Callable[[GuideCall], Tensor]) -> Tensor:
        combined = next(call)
        if self.config.eta == 1 or call.scale is None:
            return combined
        parallel, _ = project(call.cond - call.uncond, call.cond)
        return combined - torch.as_tensor((call.scale - 1) * (1 - self.config.eta), dtype=combined.dtype) * parallel
