"""``diffgraft calibrate accvideo``: key points of the teacher's own trajectories, with its guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any

import torch
from diffgraft import Calibrator, ConfigError, Effects, RunCall, Schedule, ScheduleCall, StepCall, StepOutput, Target, Unsupported
from diffgraft.methods.schema import Holds, Values
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_accvideo.knobs import PAPER, AccVideoConfig, ensure_unsaid
from diffgraft_accvideo.method import union
from diffgraft_accvideo.schedules import ensure_flow, is_euler, whole


class Facts(TypedDict):
    """Of a file of trajectories: the prompt of each, K, the places of the kept points in 0..K, and the teacher's guidance scale."""

    texts: list[str]
    grid: Annotated[int, Field(ge=1)]
    index: list[int]
    guidance: float | None


def askew(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What does not go together in a file, or None."""
    index, sigmas, points = facts["index"], tensors["sigmas"].tolist(), tensors["points"]
    if len(facts["texts"]) != len(points):
        return f"it has {len(points)} trajectories and {len(facts['texts'])} prompts"
    if len(index) != len(sigmas) or index[:1] != [0] or index[-1:] != [facts["grid"]] or any(a >= b for a, b in pairwise(index)):
        return f"its fact index does not rise from 0 to {facts['grid']}, a number for each of its {len(sigmas)} levels"
    if any(a <= b for a, b in pairwise(sigmas)):
        return "its levels do not fall"
    return None


HOLDS = Holds({"points": Values(("n", "P", ...)), "sigmas": Values(("P",), low=0, high=1)}, Facts, askew)


@dataclass
class Seen:
    """Of a run: which points are kept, and what was seen there; ``sigmas`` of all K + 1."""

    keep: list[int] = field(default_factory=list)
    points: list[Tensor] = field(default_factory=list)
    sigmas: Tensor | None = None
    guidance: float | None = None


class Collect(Calibrator):
    """Records of one run: "points" [rows, P, ...], "sigmas" [P], "index" [P], "guidance" [0 or 1], and the "text" of its prompts."""

    name = "accvideo_collection"
    paper = PAPER
    Config = AccVideoConfig
    State = Seen
    effects = Effects(edits=frozenset({"schedule"}))
    config: AccVideoConfig

    def check(self, target: Target) -> None:
        ensure_unsaid(self.config, "the teacher is the pipeline as it is", "lora", "strength", "guidance")
        ensure_teaches(target.pipe, target.family, self.config)

    def run(self, call: RunCall, next: Any) -> Any:
        ensure_teaches(call.pipe, call.family, self.config)
        prompt = call.get("prompt")
        if prompt is None:
            raise ConfigError("plugin 'accvideo': trajectories are kept with their prompts: give them as text")
        return super().run(call.replace(output_type="latent"), next)  # nobody looks at the videos

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        K, seen = len(own.timesteps), call.shared
        if max(self.config.points) > K:
            raise ConfigError(
                f"plugin 'accvideo': points = {max(self.config.points)} of a trajectory of {K} steps: at most as many; ask for more steps"
            )
        if "grid" in self.config.model_fields_set and self.config.grid != K:
            raise ConfigError(
                f"plugin 'accvideo': grid = {self.config.grid}, and this trajectory has {K} steps: say --steps {self.config.grid}"
            )
        made = whole(call.scheduler, K, self.config, own.timesteps.device, call.get("mu"))
        assert made.sigmas is not None
        seen.keep, seen.points, seen.sigmas = union(K, self.config.points), [], made.sigmas.double().cpu()
        return made

    def step(self, call: StepCall, next: Any) -> StepOutput:
        seen: Seen = call.shared
        if call.step.index in seen.keep:
            seen.points.append(call.sample.float())
        out: StepOutput = next(call)
        if call.step.is_last:
            seen.points.append(out.sample.float())
            seen.guidance = call.run.guidance_scale(call.family.denoisers[0]) if call.run.guidance_active() else None
        return out

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        seen, prompt = call.shared, call["prompt"]
        assert seen.sigmas is not None
        points = torch.stack(seen.points, 1)
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        each = len(points) // len(texts)
        said = "\n".join(text.replace("\n", " ") for text in texts for _ in range(each)).encode()
        guidance = torch.tensor([] if seen.guidance is None else [seen.guidance], dtype=torch.float64)
        index = torch.tensor(seen.keep)
        return {"points": points, "sigmas": seen.sigmas[index], "index": index, "guidance": guidance,
                "text": torch.tensor(list(said), dtype=torch.uint8)}  # fmt: skip

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        first = records[0]
        facts = {
            "texts": [text for record in records for text in bytes(record["text"].tolist()).decode().split("\n")],
            "grid": int(first["index"][-1]),
            "index": first["index"].tolist(),
            "guidance": float(first["guidance"][0]) if len(first["guidance"]) else None,
        }
        return {"points": torch.cat([record["points"] for record in records]), "sigmas": first["sigmas"]}, facts


def ensure_teaches(pipe: Any, family: Any, knobs: AccVideoConfig) -> None:
    """Refuse a pipeline whose trajectories a student cannot be taught by.

    Raises:
        Unsupported: with the reason.
    """
    ensure_flow(family, pipe.scheduler, knobs)
    if not is_euler(pipe.scheduler):
        raise Unsupported(
            f"accvideo: a student makes Euler's steps, and {type(pipe.scheduler).__name__} makes others: collect and fit with "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=...)"
        )
    if "ImageToVideo" in type(pipe).__name__:
        raise Unsupported(f"accvideo: trajectories are kept with their prompts alone, and {type(pipe).__name__} is told a picture too")
    if getattr(pipe, "transformer_2", None) is not None:
        raise Unsupported("accvideo: this pipeline has two denoisers, and one LoRA is learned: take Wan 2.1, or a single transformer")
