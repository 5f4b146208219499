"""The leap of VideoScene (Wang, Liu, Chi, Duan, arXiv 2504.01956): a run begins at a noised draft video, and needs few steps from there.

What is roughly right already (a fast render of the scene, a clip with the wrong motion) is not made again from noise: it is encoded, noised
to a level t below the noisiest, and one to four steps of a video model, distilled for few steps or not, go from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, DenoiseCall, Effects, Family, Plugin, RunCall, Schedule, ScheduleCall, Target, Unsupported
from diffgraft.methods.conditioning import number_of_prompts
from diffgraft.methods.late import Kind, ensure_steps, kind_of, late
from diffgraft.methods.starts import start_from
from torch import Tensor

from diffgraft_videoscene_leap.drafts import (
    encode,
    ensure_encodes,
    ensure_size,
    ensure_there,
    grid_of,
    moving_square,
    rendered,
    rows,
    size_of,
    usual_size,
    videos_of,
)
from diffgraft_videoscene_leap.knobs import PAPER, VideosceneLeapConfig, level_of

__all__ = ["VideosceneLeap", "moving_square"]
__version__ = "0.1.0"
SIZES = ("num_frames", "height", "width")
NEAR = 2e-3
"""How near to 1 a flow's first level is where nothing is said of it."""


@dataclass
class Leap:
    """Of a run: the clean latents of its drafts [drafts, ...]."""

    z: Tensor | None = None


class VideosceneLeap(Plugin):
    name = "videoscene_leap"
    paper = PAPER
    families = ("cogvideox", "wan", "ltx", "animatediff")
    not_on: ClassVar[dict[str, str]] = {
        "*VideoToVideo*": "it begins in mid-schedule with a video of its own: its strength is the leap level there",
        "*FunControl*": "its videos are as long as the one that controls them, which no draft may be otherwise",
    }
    Config = VideosceneLeapConfig
    State = Leap
    neutral: ClassVar[dict[str, Any]] = {"level": 1.0}
    active: ClassVar[dict[str, Any]] = {"draft": moving_square, "level": 0.6}
    effects = Effects(edits=frozenset({"latents", "schedule"}), needs=frozenset({"one_size"}))
    config: VideosceneLeapConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if not self.config.leaps:
            self.effects = Effects()

    def check(self, target: Target) -> None:
        if not self.config.leaps:
            return
        self.ensure(target.family, target.pipe.scheduler, self.config.steps)
        ensure_there(self.config.draft)
        if target.pipe.config.get("expand_timesteps") and "ImageToVideo" in type(target.pipe).__name__:
            raise Unsupported("videoscene_leap: this pipeline puts its picture into the latents themselves, which a draft would draw over")
        ensure_encodes(target.pipe, target.family)

    def ensure(self, family: Family, scheduler: Any, steps: int | None) -> None:
        """Refuse a scheduler without a leap, and more steps than are left of it.

        Raises:
            Unsupported, ConfigError: with the reason.
        """
        kind = self.kind(family, scheduler)
        ensure_steps(self.name, scheduler, kind, level_of(self.config.level, kind), steps, "level")

    def kind(self, family: Family, scheduler: Any) -> Kind:
        """What the leap level is a share of.

        Raises:
            Unsupported: neither the training's time nor a flow's level.
        """
        kind = kind_of(self.name, family, scheduler)
        if kind == "levels":
            raise Unsupported(
                f"videoscene_leap: {type(scheduler).__name__} spreads its levels between sigma_min and sigma_max, and the leap level is a "
                "share of the training's time: use a scheduler whose config says no sigma_max"
            )
        return kind

    def run(self, call: RunCall, next: Any) -> Any:
        knobs = self.config
        if not knobs.leaps:
            if knobs.level == 1 and knobs.draft is not None:
                call.note("inactive: at level = 1 a run is the plain one: size, frames and steps are the call's, and not the draft's")
            elif knobs.draft is None and knobs.level != 1:
                unused = "" if knobs.steps is None else f", and steps = {knobs.steps} is not applied"
                call.note(f"inactive: no draft is given, so this run is the plain one{unused}; set draft")
            return next(call)
        if own := [name for name in ("timesteps", "sigmas") if call.get(name) is not None]:
            raise ConfigError(f"plugin 'videoscene_leap': the call says {' and '.join(own)} itself, and a leap writes another schedule; "
                              "leave them out, or set level = 1")  # fmt: skip
        call = self._with_steps(call)
        self.ensure(call.family, call.pipe.scheduler, call.get("num_inference_steps"))
        call, call.shared.z = self._with_drafts(call)
        return next(call)

    def _with_steps(self, call: RunCall) -> RunCall:
        """The call with as many steps as the knob says.

        Raises:
            ConfigError: the call says another number.
        """
        steps, said = self.config.steps, call.get("num_inference_steps")
        if steps is None:
            return call
        if "num_inference_steps" in call.said and said != steps:
            raise ConfigError(
                f"plugin 'videoscene_leap': steps = {steps}, and the call says num_inference_steps = {said}; leave one of them out"
            )
        return call.replace(num_inference_steps=steps)  # type: ignore[no-any-return]

    def _with_drafts(self, call: RunCall) -> tuple[RunCall, Tensor]:
        """The call in its draft's size, and the clean latents of its drafts, of which there is one or one for each prompt.

        Raises:
            ConfigError: another number of drafts, or another size.
        """
        draft, pipe, family, n = self.config.draft, call.pipe, call.family, number_of_prompts(call.arguments())
        said = {name: int(call[name]) for name in SIZES if name in call.said and call.get(name) is not None}
        if callable(draft):
            known = {name: int(call[name]) for name in SIZES if call.get(name) is not None}  # those of a bundled checkpoint too
            prompt, size = call.get("prompt"), usual_size(pipe, family, known)
            prompts = [prompt] * n if prompt is None or isinstance(prompt, str) else list(prompt)
            videos = [video for each in prompts for video in videos_of(rendered(draft, each, size))]
            said = dict(zip(SIZES, size, strict=True))
        else:
            videos = videos_of(draft)
        if len(videos) not in (1, n):
            raise ConfigError(f"plugin 'videoscene_leap': draft has {len(videos)} videos, and the call has {n} prompts: give one for each, "
                              "or one for all")  # fmt: skip
        sizes = {size_of(video) for video in videos}
        if len(sizes) > 1:
            told = " and ".join(map(str, sorted(sizes)))
            raise ConfigError(f"plugin 'videoscene_leap': draft: videos of one call have one size, and these have {told}")
        (size,) = sizes
        ensure_size(size, grid_of(pipe, family), said)
        call.count("drafts", len(videos))
        return call.replace(**dict(zip(SIZES, size, strict=True))), encode(pipe, family, torch.stack(videos))

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        if not self.config.leaps:
            return own
        kind = self.kind(call.family, call.scheduler)
        if kind == "flow" and own.sigmas is not None and abs((top := float(own.sigmas[0])) - 1) > NEAR:  # once a run
            level = level_of(self.config.level, kind)
            call.note(f"the scheduler's own levels begin at {top:.4g}, so the leap is to {level * top:.4g} = level x {top:.4g}")
        # trailing: the first step is at t itself, however few there are
        return late(call, own, kind, level_of(self.config.level, kind), "level", timestep_spacing="trailing")

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if call.step.call == 0 and self.config.leaps:
            z = rows(call.shared.z.to(call.latents.device), call.latents.shape, "the draft")
            call = call.with_latents(start_from(call, z))
        return next(call)  # type: ignore[no-any-return]
