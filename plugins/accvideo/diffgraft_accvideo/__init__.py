"""AccVideo (Zhang, Chen, Wang, Liu, Wang, Qiao, arXiv 2503.19462): few steps without guidance, along the teacher's trajectory.

A student that was taught to jump between key points of its teacher's own trajectories makes N steps on exactly these levels, and none of
its teacher's guidance, which is in it already.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffgraft import ConfigError, DenoiseCall, Effects, Need, Plugin, RunCall, Schedule, ScheduleCall, Target, Unsupported
from diffgraft.methods.adapters import beside
from diffgraft.methods.distilled import ensure_own_levels, in_steps, unguided
from torch import Tensor

from diffgraft_accvideo.collection import Collect
from diffgraft_accvideo.fitting import AccVideoFitter
from diffgraft_accvideo.knobs import PAPER, AccVideoConfig
from diffgraft_accvideo.schedules import ensure_flow, is_euler, strided, whole

__all__ = ["AccVideo"]
__version__ = "0.1.0"


class AccVideo(Plugin):
    name = "accvideo"
    paper = PAPER
    families = ("wan", "ltx")
    not_on: ClassVar[dict[str, str]] = {"*VideoToVideo*": "it begins in mid-schedule with a video, and a student knows whole runs only"}
    Config = AccVideoConfig
    neutral: ClassVar[dict[str, Any]] = {"steps": 0}
    active: ClassVar[dict[str, Any]] = {"steps": None, "guidance": "keep"}
    effects = Effects(edits=frozenset({"schedule", "weights"}))
    needs = (Need("adapter", "lora"),)
    calibration = Collect
    fitting = AccVideoFitter
    config: AccVideoConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        edits = {"schedule": self.config.steps != 0, "weights": self.config.lora is not None and self.config.strength > 0}
        self.effects = Effects(edits=frozenset(name for name, does in edits.items() if does and self.config.steps != 0))

    def check(self, target: Target) -> None:
        if self.config.steps == 0:
            return
        ensure_flow(target.family, target.pipe.scheduler, self.config)
        adapter = target.given["lora"]
        if adapter is not None and (without := target.denoisers.keys() - adapter.loras.keys()):
            raise Unsupported(
                f"accvideo: lora is for {', '.join(adapter.loras) or 'no denoiser'} alone, and a student replaces {min(without)} too: name "
                f"one for each, lora={{{', '.join(f'{name!r}: FILE' for name in target.denoisers)}}}"
            )

    def run(self, call: RunCall, next: Any) -> Any:
        knobs = self.config
        if knobs.steps == 0:
            call.note("inactive: steps is 0, so the run is the pipeline's own")
            return next(call)
        ensure_flow(call.family, call.pipe.scheduler, knobs)  # again: the scheduler may be another one now
        ensure_own_levels(call, "steps=0")
        call = self._with_steps(call)
        if knobs.guidance != "keep":
            call = unguided(call, "guidance='keep'")
        if call.given("lora") is None:
            call.note("no lora is given: the base model makes the student's few steps, which it was not made for")
        elif not is_euler(call.pipe.scheduler):
            call.note(f"{type(call.pipe.scheduler).__name__} mixes earlier steps into each; what `fit` learned are FlowMatchEuler's steps")
        if knobs.levels == "official" and not is_euler(call.pipe.scheduler):
            call.note(f"levels = 'official' changes nothing: {type(call.pipe.scheduler).__name__} has one line of its own")
        if knobs.trajectories is not None:
            call.note("trajectories are for `diffgraft fit accvideo`; a run does not read them")
        return next(call)

    def _with_steps(self, call: RunCall) -> RunCall:
        """The call with as many steps as the student makes.

        Raises:
            ConfigError: the call says another number, or more than the grid has.
        """
        N, said = self.config.steps, call.get("num_inference_steps")
        if N is None:
            if isinstance(said, int) and said > self.config.grid:
                raise ConfigError(f"plugin 'accvideo': num_inference_steps = {said} of a grid of {self.config.grid}: at most as many")
            return call
        return in_steps(call, N, "steps=None to have the call's")

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        if self.config.steps == 0:
            return own
        made = whole(call.scheduler, self.config.grid, self.config, own.timesteps.device, call.get("mu"))
        return strided(made, len(own.timesteps))

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        adapter, strength = call.given("lora"), self.config.strength
        if adapter is None or strength == 0 or self.config.steps == 0:
            return next(call)  # type: ignore[no-any-return]
        with beside(call.model, {adapter.name: strength}):
            return next(call)  # type: ignore[no-any-return]
