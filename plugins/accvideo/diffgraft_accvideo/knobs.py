"""The knobs, and the paper."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal

from diffgraft import ConfigError, Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact, checksum
from pydantic import Field, field_serializer, model_validator
from typing_extensions import Self

PAPER = Paper(
    title="AccVideo: Accelerating Video Diffusion Model with Synthetic Dataset",
    arxiv="2503.19462",
    implemented="the few-step schedule without guidance, with a published or fitted LoRA; `calibrate` keeps the key points of the "
    "teacher's own trajectories, `fit` learns a LoRA that jumps from one to the next",
    omitted="the adversarial loss between the student's outputs and the stored latents; training of all weights; the text-video pairs of "
    "the published data set",
    licence="weights under their own licences (those for Hunyuan Video exclude the EU, the UK and South Korea); no training code is "
    "published; written from the paper's description",
)


class AccVideoConfig(PluginConfig):
    """Knobs of the few-step run, and of its collection of trajectories."""

    steps: int | None = Field(
        10,
        ge=0,
        le=1000,
        description="N: steps of a run, those that the LoRA was made for (published: 10 for Wan, 5 for Hunyuan Video); none: as many as "
        "the call says; 0 is off, bit for bit",
    )
    lora: str | Path | dict[str, Any] | None = Field(
        None, description="a LoRA file that `diffgraft fit accvideo` or somebody else made, or one for each denoiser by its attribute"
    )
    strength: float = Field(1.0, ge=0, le=2, description="of the LoRA; 0 is the base model on the same schedule")
    guidance: Literal["off", "keep"] = Field(
        "off",
        description="off: none, and a call that says a scale above 1 is refused; keep: the call's own, at twice the cost (the "
        "published students and those of `fit` hold their teacher's guidance already)",
    )
    grid: int = Field(50, ge=1, le=1000, description="K: steps of the teacher, of whose levels every (K/N)-th is taken")
    shift: float | None = Field(
        None, gt=0, le=100, description="s of the levels, s sigma / (1 + (s - 1) sigma) (published: 5 for Wan, 7 for Hunyuan Video); none: "
        "the scheduler's own",
    )  # fmt: skip
    levels: Literal["line", "official"] = Field(
        "line",
        description="of FlowMatchEuler's K steps: line: 1 to 1/K, shifted once, as UniPC has them; official: what the scheduler makes of "
        "the number K alone, which the official Euler script strides",
    )
    points: tuple[int, ...] = Field(
        (5, 10), min_length=1, description="N of the students whose key points `calibrate` keeps of each trajectory"
    )
    trajectories: str | Path | Artefact | None = Field(
        None, description="what `diffgraft calibrate accvideo` collected, for `diffgraft fit`; a run does not read it"
    )

    @field_serializer("trajectories", when_used="json-unless-none")
    def _told(self, value: Any) -> str:  # what tells one fit's data from another's
        return checksum(value.facts, value.tensors) if isinstance(value, Artefact) else str(value)

    @model_validator(mode="after")
    def _on_the_grid(self) -> Self:
        if self.steps is not None and self.steps > self.grid:
            raise ValueError(f"steps = {self.steps} of a grid of {self.grid}: at most as many")
        if wrong := [n for n in self.points if not 1 <= n <= 1000]:
            raise ValueError(f"points = {wrong[0]}: a number of steps, 1 to 1000")
        return self


def ensure_unsaid(knobs: AccVideoConfig, why: str, *names: str) -> None:
    """Raises ConfigError where one of the knobs ``names``, which would do nothing, is not at its default."""
    for name in names:
        value, usual = getattr(knobs, name), type(knobs).model_fields[name].default
        if value != usual:
            raise ConfigError(f"plugin 'accvideo': {name} = {brief(value)} is for a run; {why}: leave {name} out")
