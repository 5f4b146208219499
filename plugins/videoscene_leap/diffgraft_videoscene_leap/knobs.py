"""The knobs, and the paper."""

from __future__ import annotations

from typing import Any

from diffgraft import Paper, PluginConfig
from diffgraft.methods.late import Kind
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from diffgraft_videoscene_leap.drafts import ensure_form

PAPER = Paper(
    title="VideoScene: Distilling Video Diffusion Model to Generate 3D Scenes in One Step",
    arxiv="2504.01956",
    implemented="the leap at inference: a draft video is encoded and noised to the leap level t, and one to four steps of a (distilled) "
    "video model go from there",
    omitted="the 3D Gaussian splatting front end that renders the drafts (MVSplat, NoPoSplat): the draft is given; the leap flow "
    "distillation; the policy network that picks t for each scene, whose code is not public: t is a knob",
    licence="official code MIT; written from the equations",
)
AUTHORS = {"times": 0.55, "flow": 0.68}
"""Leap levels where nobody says one: the authors' t = 549 of 1000, and the level of a flow that is as noisy (CogVideoX-5B: 0.681)."""


class VideosceneLeapConfig(PluginConfig):
    """Knobs of the leap."""

    draft: Any = Field(
        None,
        description="the draft video, or one for each prompt: frames [frames, 3, height, width] in 0 to 1 (tensor) or [frames, height, "
        "width, 3] (array), PIL pictures, a path (folder of pictures, .gif, .npy, film), a list of these; or a function that renders it: "
        "(prompt, frames, height, width) -> video; none: off",
    )
    level: float | None = Field(
        None,
        gt=0,
        le=1,
        description="t: the leap level, a share of the training's time (of the noise level of flow models); towards 0 the draft comes out "
        "as it is, at 1 a run is the plain one; none: the authors' 0.55 (t = 549), and 0.68 of flows, which is as noisy",
    )
    steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        description="steps from the leap level to the clean video (the authors: 1); none: the call's num_inference_steps; not with level 1",
    )

    @field_validator("draft")
    @classmethod
    def _video(cls, value: Any) -> Any:
        if value is not None:
            ensure_form(value)
        return value

    @model_validator(mode="after")
    def _no_steps_at_1(self) -> Self:
        if self.level == 1 and self.steps is not None:
            raise ValueError(
                f"steps = {self.steps} has no effect at level = 1, where a run is the plain one: leave steps out, and say "
                f"num_inference_steps = {self.steps} in the call"
            )
        return self

    @property
    def leaps(self) -> bool:
        """Whether a run begins at a draft."""
        return self.draft is not None and self.level != 1


def level_of(level: float | None, kind: Kind) -> float:
    """The leap level of a scheduler's kind."""
    return AUTHORS[kind] if level is None else level
