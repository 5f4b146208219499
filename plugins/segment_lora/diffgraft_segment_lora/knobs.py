"""The knobs of the run, and of the fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffgraft import Paper, PluginConfig
from diffgraft.methods.adapters import Adapter
from pydantic import Field, field_serializer, field_validator, model_validator
from typing_extensions import Self

from diffgraft_segment_lora.method import Segment, overlapping

PAPER = Paper(
    title="AlignHuman: Improving Motion and Fidelity via Timestep-Segment Preference Optimization for Audio-Driven Human Animation",
    arxiv="2506.11144",
    implemented="LoRA experts, each in a segment of the noise levels of its own, and the preference optimisation of one within its segment",
    omitted="the video model, its data and its two experts, none of which is public; how pairs are made follows what diffgraft has",
    licence="no official code",
)


class SegmentLoraConfig(PluginConfig):
    """Knobs of the run."""

    lora: Any = Field(
        None,
        description="the experts: a LoRA file (path or Hub id), a list of them, one a segment, or tensors in memory; where there are two "
        "denoisers a dict of each by its name; none: nothing is done",
    )
    segments: tuple[Segment, ...] = Field(
        ((1.0, 0.0),),
        description="S_k: [from, to] of each expert in sigma = s / (a + s), 1 noise alone and 0 clean; a level on a boundary belongs to "
        "the noisier segment; in a gap the model runs without experts",
    )
    weights: tuple[float, ...] | None = Field(
        None, description="strength of each expert, times what its file says (-10 to 10); none: 1 for each"
    )
    overlap: bool = Field(False, description="whether segments may overlap, where their experts then act together")

    @field_validator("lora")
    @classmethod
    def _form(cls, value: Any) -> Any:
        each = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if isinstance(value, (list, tuple)) and not value:
            raise ValueError("an empty list; give a LoRA for each segment, or none at all")
        if wrong := [one for one in each if not isinstance(one, (str, Path, Mapping, Adapter))]:
            raise ValueError(f"{type(wrong[0]).__name__} is no LoRA; give a file, a Hub id or tensors, or a list of them, one a segment")
        return value

    @field_validator("segments", "weights", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        rows = value if isinstance(value, (list, tuple)) else []
        each = [one for row in rows for one in (row if isinstance(row, (list, tuple)) else [row])]
        if (wrong := next((one for one in each if isinstance(one, (bool, str))), None)) is not None:
            raise ValueError(f"{wrong!r} is no number")
        return value

    @field_validator("segments")
    @classmethod
    def _falling(cls, value: tuple[Segment, ...]) -> tuple[Segment, ...]:
        if not value:
            raise ValueError("no segment; give [from, to] for each LoRA")
        for start, end in value:
            if not 1 >= start > end >= 0:
                raise ValueError(f"[{start:g}, {end:g}] does not fall: a run goes from noise, 1, to clean, 0: 1 >= from > to >= 0")
        return value

    @field_validator("weights")
    @classmethod
    def _strengths(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if (wrong := next((weight for weight in value or () if not -10 <= weight <= 10), None)) is not None:
            raise ValueError(f"{wrong:g} is not in -10 to 10")
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        number = len(self.segments)
        if self.lora is not None and (has := len(self.lora) if isinstance(self.lora, (list, tuple)) else 1) != number:
            raise ValueError(f"lora has {has} LoRA for {number} segments: one for each")
        if self.weights is not None and len(self.weights) != number:
            raise ValueError(f"weights = {list(self.weights)} for {number} segments: one for each")
        if not self.overlap and (found := overlapping(self.segments)) is not None:
            one, other = (list(self.segments[k]) for k in found)
            raise ValueError(f"segments {one} and {other} overlap; part them, or say overlap=true: both LoRA act there together")
        return self


class PreferenceConfig(PluginConfig):
    """Knobs of the fit (``diffgraft fit segment_lora --set NAME=VALUE``)."""

    start: float = Field(1.0, gt=0, le=1, description="where the segment S_k begins, in sigma")
    end: float = Field(0.0, ge=0, lt=1, description="where it ends")
    beta: float = Field(2500.0, gt=0, description="beta, on mean squared errors: larger keeps the expert nearer to the base model")
    rank: int = Field(8, ge=1, le=1024, description="rank of the LoRA")
    rate: float = Field(1e-4, gt=0, le=1, description="largest learning rate")
    reward: Any = Field(
        None,
        description='what ranks pictures made for pairs, without data: a name ("emoji_judge"), "module:attribute", a callable',
    )
    candidates: int = Field(4, ge=2, le=64, description="pictures that are made of each prompt then; the best and the worst are its pair")

    @field_serializer("reward")
    def _name(self, value: Any) -> str | None:
        """What a fit that goes on is told by."""
        name = getattr(value, "__qualname__", type(value).__name__)
        return value if value is None or isinstance(value, str) else f"{value.__module__}:{name}"

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.start <= self.end:
            raise ValueError(f"start = {self.start:g} and end = {self.end:g} do not fall: a run goes from noise, 1, to the clean sample, 0")
        return self
