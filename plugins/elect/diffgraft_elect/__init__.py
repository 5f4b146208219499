"""ELECT: of several seeds of an instruction edit the one that leaves the background alone, chosen after a few steps (Kim, Lee, Cho, Jo,
Jung, Kim, Yang, arXiv 2504.13490).

A run becomes passes of the pipeline: the first steps of all candidates, a pass for each or for several beside each other, and one whole
run of the winner, which takes these steps from a record of the predictions. So it is bit for bit what the winner's generator alone makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import (
    ConfigError,
    DenoiseCall,
    Effects,
    NotFinite,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.conditioning import is_of_the_prompt, number_of_prompts
from diffgraft.methods.decoding import ensure_decodes, scaled_latents, to_pixels
from diffgraft.methods.inputs import parameters
from diffgraft.methods.predictions import clean_estimate, known_kind, levels_of
from diffgraft.methods.replay import Record, beginning, pace_of
from pydantic import Field
from torch import Tensor

from diffgraft_elect.method import Space, difference, inconsistency, step_map
from diffgraft_elect.seeds import Starts, starts_of

__all__ = ["Elect"]
__version__ = "0.1.0"


OTHERS = (
    "use another scheduler (DDIM, Euler, Heun; Euler ancestral or DPM++ with algorithm_type='sde-dpmsolver++' for fresh noise in each "
    "step), or set candidates = 1"
)
"""The way out of a scheduler that is refused."""


class ElectConfig(PluginConfig):
    """Knobs of ELECT."""

    candidates: int = Field(10, ge=1, description="N: seeds tried for each picture, the call's own among them where it has one; 1 is off")
    stop: float = Field(0.4, gt=0, le=1, description="s / T: the share of the steps after which one is chosen; 1: best of N whole runs")
    window: float = Field(0.2, gt=0, le=1, description="share of the steps, from the first on, that make the relevance map M; at most s")
    space: Space = Field(
        "latent",
        description="where backgrounds are compared: latents, weighted 1 - M^2 (the paper), or decoded pixels, weighted 1 - M with maps "
        "that were squared (the official code)",
    )
    at_once: int = Field(1, ge=1, description="candidates that one pass denoises beside each other: more is faster and takes more memory")


@dataclass
class Election:
    """Of one run. ``rows`` are the pictures that the call asks for."""

    record: Record | None = None
    trying: int = 0
    """How many candidates of each row this pass tries; 0 in the winners' own."""
    rows: int = 0
    steps: int = 0
    """s."""
    maps: dict[int, Tensor] = field(default_factory=dict)
    """The sum of d over the candidates so far [rows, height, width], by scheduler call."""
    last: Tensor | None = None
    """The last prediction of this pass, for calls that lead nowhere."""
    source: Tensor | None = None
    """The latents of the picture to edit [rows, ...], in the pipeline's scale."""
    x0: list[Tensor] = field(default_factory=list)
    """Predicted clean samples at step s, of each pass [candidates of it * rows, ...]."""


class Elect(Plugin):
    name = "elect"
    paper = Paper(
        title="Early Timestep Zero-Shot Candidate Selection for Instruction-Guided Image Editing",
        arxiv="2504.13490",
        implemented="choice among seeds by the background inconsistency score at an early step, in latents or pixels; the winner goes on",
        omitted="the choice among prompts that a language model wrote; editors without a branch for the picture alone",
        licence="official code without a licence; written from the formulas",
    )
    families = ("sd_edit", "sdxl_edit")
    Config = ElectConfig
    State = Election
    neutral: ClassVar[dict[str, Any]] = {"candidates": 1}
    active: ClassVar[dict[str, Any]] = {"candidates": 2, "space": "pixel"}
    effects = Effects(
        replaces=frozenset({"noise"}), skips=frozenset({"denoiser"}), edits=frozenset({"schedule"}), needs=frozenset({"extra_forwards"})
    )
    config: ElectConfig

    def check(self, target: Target) -> None:
        self._ensure(target.pipe, target.family)

    def _ensure(self, pipe: Any, family: Any) -> None:
        """Raises Unsupported where predictions say nothing of the clean sample, or a run cannot be made twice."""
        if self.is_neutral:
            return
        name = type(pipe.scheduler).__name__
        try:
            known_kind(family, pipe.scheduler)
        except Unsupported as error:
            raise Unsupported(f"elect: {error}; {OTHERS}") from error
        if hasattr(pipe.scheduler, "noise_sampler"):
            raise Unsupported(f"elect: {name} draws its noise past the call's generator, so that a candidate cannot be run again; {OTHERS}")
        if hasattr(pipe.scheduler, "sigmas_interpol"):
            raise Unsupported(f"elect: {name} asks the denoiser between its sigmas too, where its levels are not known here; {OTHERS}")
        if self.config.space == "pixel":
            ensure_decodes(pipe, family)

    # passes -------------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Any) -> Any:
        knobs = self.config
        if self.is_neutral:
            return next(call)
        self._ensure(call.pipe, call.family)  # again: the scheduler may be another one now
        arguments = with_defaults(call)
        if not guided(call, arguments):
            call.note("inactive: guidance was off in this run, and without its branches nothing says where the instruction acts")
            return next(call)
        if arguments.get("latents") is not None:
            raise Unsupported(
                f"elect: candidates = {knobs.candidates}, but the call gives latents, from which all of them would begin: leave them "
                "out (a generator says which noise is the first candidate's), or set candidates = 1"
            )
        rows = number_of_prompts(arguments) * (arguments.get("num_images_per_prompt") or 1)
        generator = arguments.get("generator")
        if isinstance(generator, (list, tuple)) and len(generator) != rows:
            return next(call)  # the pipeline says what is wrong
        if wrong := [each for each in listed(generator) if generator is not None and not isinstance(each, torch.Generator)]:
            raise ConfigError(
                f"elect: generator is {wrong[0]!r}, which is no torch.Generator: give torch.Generator().manual_seed(...), a list with one "
                "for each picture, or none"
            )
        starts = starts_of(generator, rows, knobs.candidates)
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        call.shared.rows = rows
        winners = self._elect(call, next, starts, lengths_fit(arguments, rows))
        if winners is None:
            return next(call)
        made = next(call.replace(generator=starts.resume(winners)))
        call.shared.record.ensure_begun_alike(call.entry.name)
        return made

    def _elect(self, call: RunCall, next: Any, starts: Starts, fits: bool) -> list[int] | None:
        """The number of the winning candidate of each row; None where the user has ended the call.

        Where it is not plain that the call's lengths fit each other, the first candidate is tried alone, so that the pipeline says what
        is wrong before anything has run: repeated, three prompts would fit two pictures.
        """
        shared: Election = call.shared
        first = 0
        while first < starts.candidates and not call.stopped:
            shared.trying = min(self.config.at_once if fits or first else 1, starts.candidates - first)
            several = {} if shared.trying == 1 else repeated(call, shared.rows, shared.trying)
            generators = starts.of(range(first, first + shared.trying))
            if shared.record is not None:
                shared.record.another_pass()
            next(call.replace(**several, generator=generators, output_type="latent", return_dict=False))
            first += shared.trying
        shared.trying, shared.last = 0, None
        if call.stopped or shared.record is None:
            shared.record = None
            return None
        scores, M = self._scores(call)
        call.record({"bis": scores, "seeds": starts.seeds, "relevance": M})
        values = scores.tolist()
        winners = [best(call.entry.name, [of_one[row] for of_one in values], row, shared.steps) for row in range(shared.rows)]
        for row, winner in enumerate(winners):
            others = [of_one[row] for i, of_one in enumerate(values) if i != winner and math.isfinite(of_one[row])]
            range_ = f"{min(others):.4g} to {max(others):.4g}" if others else "not finite"
            call.note(
                f"picture {row + 1}: candidate {winner + 1} of {starts.candidates} ({starts.words(winner, row)}), background "
                f"inconsistency {values[winner][row]:.4g} after {shared.steps} step(s), the others {range_}"
            )
        shared.record.choose([winner * shared.rows + row for row, winner in enumerate(winners)])
        shared.x0, shared.maps, shared.source = [], {}, None
        return winners

    @torch.no_grad()
    def _scores(self, call: RunCall) -> tuple[Tensor, Tensor]:
        """BIS [candidates, rows] and M [rows, height, width]."""
        shared, space = call.shared, self.config.space
        totals = [total for total in shared.maps.values() if total.ndim]  # a callback may have cut guidance off
        if shared.source is None or not totals or not shared.x0:
            raise Unsupported(
                "elect: a plugin further out answered the denoiser's first calls in its place, so there is nothing to choose by: put "
                "elect first in the list"
            )
        M = torch.stack([step_map(total / self.config.candidates, space) for total in totals]).mean(0)

        def seen(latents: Tensor) -> Tensor:
            if space == "latent":
                return latents
            return to_pixels(call.pipe, call.family, latents, call.run.arguments)

        source = seen(shared.source)
        candidates = [x0 for of_pass in shared.x0 for x0 in of_pass.split(shared.rows)]
        return torch.stack([inconsistency(seen(x0), source, M, space) for x0 in candidates]), M

    # inside one of them -------------------------------------------------------------------------------------------------------------

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        schedule: Schedule = next(call)
        shared: Election = call.shared
        if not shared.trying:
            return schedule
        whole = len(schedule.timesteps)
        pace = pace_of(call.scheduler)
        total = pace.steps_in(whole)
        shared.steps = share_of(self.config.stop, total)
        calls = min(pace.call_of(shared.steps), whole)
        if shared.record is None:
            shared.record = Record(calls)
            shared.maps = dict.fromkeys(range(min(pace.call_of(share_of(self.config.window, total)), calls)), torch.zeros(()))
        return beginning(call, schedule, calls)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        shared: Election = call.shared
        if shared.record is None:
            return next(call)  # type: ignore[no-any-return]
        if not shared.trying:
            known = shared.record.answer(call, range(shared.rows))
            if known is None:
                return next(call)  # type: ignore[no-any-return]
            call.count("taken from the record")
            return known
        if call.step.call >= shared.record.calls:
            assert shared.last is not None
            return shared.last
        shared.last = shared.record.keep(call, next(call))
        parts = dict(zip(call.branches, shared.last.chunk(len(call.branches)), strict=True))
        if "image" in parts and call.step.call in shared.maps:
            d = difference(parts["cond"], parts["image"])
            total = shared.maps[call.step.call]
            shared.maps[call.step.call] = total.to(d) + d.unflatten(0, (shared.trying, shared.rows)).sum(0)
        if shared.source is None:
            x = call.only("cond").sample[: shared.rows]
            shared.source = source_latents(call.pipe, x[:, call.latents.shape[1] :])
        call.count("for the choice")
        return shared.last

    def step(self, call: StepCall, next: Any) -> StepOutput:
        shared: Election = call.shared
        if shared.trying and shared.record is not None and call.step.call < shared.record.calls:
            kind = known_kind(call.family, call.pipe.scheduler)
            x0 = clean_estimate(call.sample.float(), call.model_output.float(), levels_of(call), kind)
            if call.step.call:
                shared.x0[-1] = x0
            else:
                shared.x0.append(x0)
        return next(call)  # type: ignore[no-any-return]


def best(name: str, scores: Sequence[float], row: int, steps: int) -> int:
    """The first of the candidates with the least score; one whose score is no finite number never wins.

    Raises:
        NotFinite: none has one.
    """
    finite = [i for i, score in enumerate(scores) if math.isfinite(score)]
    if not finite:
        raise NotFinite(
            f"{name}: after {steps} step(s) no candidate of picture {row + 1} has a finite score, so the denoiser's predictions or the "
            "picture to edit hold NaN or infinite values: run the pipeline without the plugin and with `pipe.plugins.check_finite`, or "
            "in float32"
        )
    return min(finite, key=lambda i: scores[i])


def share_of(share: float, total: int) -> int:
    """So many of ``total`` steps, at least one."""
    return max(1, math.floor(share * total + 0.5))


def with_defaults(call: RunCall) -> dict[str, Any]:
    """The call's arguments, with the pipeline's own defaults."""
    own = {name: p.default for name, p in parameters(call.pipe).items() if p.default is not p.empty}
    return {**own, **call.arguments()}


def guided(call: RunCall, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline will ask for the branches of the picture and of the instruction."""
    return (arguments[call.family.guidance.scale] or 0) > 1 and (arguments["image_guidance_scale"] or 0) >= 1


def listed(value: Any) -> list[Any]:
    """A list's members, or what is alone."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def lengths_fit(arguments: Mapping[str, Any], rows: int) -> bool:
    """Whether there is plainly one text of each kind for each prompt, and one picture for all, for each prompt or for each row."""
    prompts, prompt, image = number_of_prompts(arguments), arguments.get("prompt"), arguments.get("image")
    for name, value in arguments.items():
        if not is_of_the_prompt(name) or value is None:
            continue
        if (1 if isinstance(value, str) else len(value)) != prompts:
            return False
        if prompt is not None and not isinstance(value, Tensor) and isinstance(value, str) != isinstance(prompt, str):
            return False
    pictures = sum(len(each) if getattr(each, "ndim", 3) == 4 else 1 for each in listed(image))
    return pictures in (1, prompts, rows)


def repeated(call: RunCall, rows: int, times: int) -> dict[str, Any]:
    """What changes in the call for each of its pictures to be made ``times`` times: all of them, then all of them again."""
    each = call.get("num_images_per_prompt") or 1
    changes: dict[str, Any] = {"num_images_per_prompt": 1}
    for name, value in call.arguments().items():
        if not is_of_the_prompt(name) or value is None:
            continue
        if isinstance(value, Tensor):
            changes[name] = value.repeat_interleave(each, 0).repeat(times, *[1] * (value.ndim - 1))
        else:
            texts = [value] if isinstance(value, str) else list(value)
            changes[name] = [text for text in texts for _ in range(rows // len(texts))] * times
    return changes


def source_latents(pipe: Any, appended: Tensor) -> Tensor:
    """The picture to edit in the pipeline's own scale: InstructPix2Pix gives the denoiser what the autoencoder's encoder gives, CosXL's
    editor (``is_cosxl_edit``) that in scale."""
    return appended.float() if getattr(pipe, "is_cosxl_edit", False) else scaled_latents(pipe.vae, appended.float())
