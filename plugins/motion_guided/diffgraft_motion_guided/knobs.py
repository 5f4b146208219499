"""The knobs of motion-guided sampling, and the paper."""

from __future__ import annotations

from typing import Any

from diffgraft import Paper, PluginConfig
from pydantic import Field, field_validator

from diffgraft_motion_guided.flows import read_clip, read_flow
from diffgraft_motion_guided.method import Pairs, Scale

PAPER = Paper(
    title="Motion-Guided Latent Diffusion for Temporally Consistent Real-world Video Super-resolution",
    arxiv="2312.00853",
    implemented="motion-guided sampling: a step along the gradient of the warping error of neighbouring frames' latents, after each step",
    omitted="the trained parts: the temporal decoder, the U-Net's conditioning on the low resolution; tiles; SpyNet, in whose place is "
    "OpenCV's DIS, your flow or your function",
    licence="official code: S-Lab License 1.0, non-commercial; written from the formulas",
)


class MotionGuidedConfig(PluginConfig):
    """Knobs of motion-guided sampling."""

    flow: Any = Field(
        None,
        description="optical flow between neighbouring frames: (forward, backward), each [T - 1, 2, H, W] (x, y) in its own pixels; two "
        "numbers: a pan, in pixels of the picture a frame; 'dis': OpenCV's, of `source`; a function of two batches of frames; none: off",
    )
    source: Any = Field(
        None,
        description="the clip that a flow is found in: pictures, [T, H, W, 3] or a tensor [T, 3, H, W]; none: the call's video or image",
    )
    g: float = Field(10.0, ge=0, le=1e6, description="g: how far latents go along the gradient (official: 10); 0: off, bit for bit")
    scale_fn: Scale = Field(
        "neg_log_var",
        description="scale(t): -log of the step's posterior variance (official; largest at the clean end), its root, or 1",
    )
    below: float = Field(
        1.0,
        gt=0,
        le=1,
        description="guide from that noise level down: deviation of the noise where signal and noise have power 1, after the step; 1: "
        "always (official)",
    )
    elements: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="N of L1's mean in the step, by which g shrinks with size: none: the elements of a frame's latents (official); 16384: "
        "steps as the official ones at 512 x 512",
    )
    frames: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="T, where a batch of pictures holds several clips one after the other; none: the flow's, or the batch",
    )
    alpha: float = Field(0.01, ge=0, le=1e6, description="alpha of the occlusion check: share of the flows' lengths (official)")
    beta: float = Field(0.5, ge=0, le=1e6, description="beta of the occlusion check, in latent pixels (official)")
    pairs: Pairs = Field(
        "neighbours",
        description="neighbours: each frame against the next, along the flow between them; official: as the authors' loop does, a flow "
        "late and first against 0",
    )

    @field_validator("flow")
    @classmethod
    def ensure_flow(cls, value: Any) -> Any:
        return read_flow(value)

    @field_validator("source")
    @classmethod
    def ensure_clip(cls, value: Any) -> Any:
        return None if value is None else read_clip(value)

    @property
    def on(self) -> bool:
        """Whether anything is guided."""
        return self.g > 0 and self.flow is not None
