"""rCM: flow models that were distilled to jump to the clean sample, in one to four steps (arXiv 2510.08431).

(Zheng, Wang, Ma, Chen, Zhang, Balaji, Chen, Liu, Zhu, Zhang.) Each step asks the model once, without guidance, jumps to the x0 that it
names, and noises that again to the next of a few fixed times. What makes a model jump is brought along: the published weights, or a LoRA
that `diffgraft fit rcm` has learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffgraft import (
    DenoiseCall,
    Effects,
    Family,
    ModulesCall,
    Need,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.adapters import adapter_layers, beside
from diffgraft.methods.distilled import ensure_own_levels, unguided
from diffgraft.methods.solvers import schedule_errors
from torch import Tensor

from diffgraft_rcm.fitter import DCMFitter
from diffgraft_rcm.knobs import PAPER, RCMConfig
from diffgraft_rcm.method import times_of
from diffgraft_rcm.scheduler import RCMScheduler
from diffgraft_rcm.weights import LAYOUT, as_diffusers, filled, misfits

__all__ = ["RCM", "RCMScheduler"]
__version__ = "0.1.0"


STEPS = 4
"""Of a call that does not say how many, where ``times`` does not."""


@dataclass
class Begun:
    """Of a run: its first latents, t_0 n, if they are to be put in; and whether that was asked."""

    first: Tensor | None = None
    asked: bool = False


class RCM(Plugin):
    name = "rcm"
    paper = PAPER
    families = ("wan", "sd3", "flux", "qwen_image", "ltx")
    Config = RCMConfig
    State = Begun
    neutral: ClassVar[dict[str, Any]] = {"times": None}
    active: ClassVar[dict[str, Any]] = {"times": "spread", "guided": True}  # any number of steps, any call
    scheduler = RCMScheduler
    effects = Effects(replaces=frozenset({"scheduler"}), edits=frozenset({"latents"}), needs=frozenset({"calibrated_run"}), stochastic=True)
    needs = (Need("weights", "weights", holds=LAYOUT), Need("adapter", "lora"))
    fitting = DCMFitter
    config: RCMConfig

    def times(self, steps: int) -> tuple[float, ...]:
        """RF times of a run of so many steps."""
        return times_of("quality" if self.config.times is None else self.config.times, steps, self.config.sigma_max)

    def usual_steps(self) -> int:
        """Of a call that does not say how many, and those that a fit learns."""
        return len(self.config.times) if isinstance(self.config.times, tuple) else STEPS

    def check(self, target: Target) -> None:
        if self.config.times is not None and target.pipe.config.get("expand_timesteps"):
            name = type(target.pipe).__name__
            raise Unsupported(f"rcm: {name} gives each token a time of its own (expand_timesteps); rCM has one a step")
        weights = target.given.get("weights")
        if weights is None or self.config.times is None:
            return
        name, model = type(target.pipe).__name__, next(iter(target.denoisers.values()))
        if target.family.name != "wan" or len(target.denoisers) > 1:
            raise Unsupported(f"rcm: the published weights are of one transformer of Wan 2.1, and {name} has another: leave weights out")
        if adapter_layers(model):
            raise Unsupported("rcm: a LoRA lies on the transformer that the weights would take the place of; load it after the plugin")
        if wrong := misfits(as_diffusers(weights.tensors), model):
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise Unsupported(f"rcm: weights {weights.source} are of another Wan than this {name}: {'; '.join(wrong[:3])}{more}")

    def modules(self, call: ModulesCall, next: Any) -> None:
        weights = call.given("weights")
        if weights is not None and self.config.times is not None:
            model = call.denoisers["transformer"]
            new = filled(model, as_diffusers(weights.tensors))
            for part, module in new.named_children():
                if any(True for _ in module.parameters()):
                    call.swap(model, part, module)
            for part, value in new.named_parameters(recurse=False):
                call.swap(model, part, value)
        next(call)

    def make_scheduler(self, old: Any, family: Family) -> Any | None:
        if self.config.times is None:
            return None
        steps = old.config.get("num_train_timesteps", 1000)
        return RCMScheduler(num_train_timesteps=steps, times=self.config.times, sigma_max=self.config.sigma_max)

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.times is None:
            call.note("inactive: times is none, so steps, guidance and weights are the pipeline's own")
            return next(call)
        ensure_own_levels(call, "times=None")
        if not self.config.guided:
            call = unguided(call, "guided=True, for a model that wants it")
        return next(call if "num_inference_steps" in call.said else call.replace(num_inference_steps=self.usual_steps()))

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        call.shared.__init__()  # other plugins, further out or in, may run the pipeline several times
        with schedule_errors(self.name):
            return next(call)  # type: ignore[no-any-return]

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.times is None:
            return next(call)  # type: ignore[no-any-return]
        if call.step.index == 0 and not call.step.begin:
            begun: Begun = call.shared
            if not begun.asked:  # the other branch's call gets the same
                begun.asked, begun.first = True, self.first(call)
            call = call if begun.first is None else call.with_latents(begun.first)
        lora = call.given("lora")
        if lora is None:
            return next(call)  # type: ignore[no-any-return]
        with beside(call.model, {lora.name: self.config.strength}):
            return next(call)  # type: ignore[no-any-return]

    @staticmethod
    def first(call: DenoiseCall) -> Tensor | None:
        """t_0 n; None where the latents are at that time already: of a noised picture, or a start that a plugin further out made."""
        scheduler = call.pipe.scheduler
        return None if scheduler.begun_noised or call.run.carried is not None else scheduler.first(call.latents)

    def step(self, call: StepCall, next: Any) -> StepOutput:
        if self.config.times is None:
            return next(call)  # type: ignore[no-any-return]
        return next(call.replace(generator=call.generator))  # type: ignore[no-any-return]
