"""LATINO and LVTINO: pictures and videos from their measurement in a few steps of a distilled model, without gradients.

(Spagnoletti, Prost, Almansa, Papadakis, Pereyra, arXiv 2503.12615; Spagnoletti, Almansa, Pereyra, arXiv 2510.01339.) The pipeline's own
loop asks the model; what it says of the clean sample is decoded, brought to the measurement by a proximal step, encoded and noised again
to the next level. Its scheduler says the levels, and its steps are not taken.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffgraft import (
    ConfigError,
    DenoiseCall,
    Effects,
    Need,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
    denoisers_of,
    find_family,
)
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.distilled import ensure_own_levels, in_steps, unguided
from diffgraft.methods.predictions import SignalNoise, clean_estimate, is_flow, known_kind, levels_next, levels_of, prediction_kind
from diffgraft.methods.problems import Problem
from diffgraft.methods.restoring import (
    begins_with_its_own,
    ensure_one_call_a_step,
    first_guess,
    latents_of,
    pixels_of,
    problem_of,
    unit_noise,
)
from torch import Tensor

from diffgraft_lvtino.frames import FAMILIES, ImageModel, ensure_image_model
from diffgraft_lvtino.knobs import PAPER, LvtinoConfig, Several, idle_knobs, too_long
from diffgraft_lvtino.method import at_step, gamma_of, schedule_at

__all__ = ["Lvtino"]
__version__ = "0.1.0"

FEW_STEP = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "CMStochasticIterativeScheduler")
"""Schedulers that only few-step models have."""


@dataclass
class Found:
    """Of one run."""

    problem: Problem | None = None
    start: Tensor | None = None
    """The first noisy sample, in place of the pipeline's."""
    image: ImageModel | None = None


class Lvtino(Plugin):
    name = "lvtino"
    paper = PAPER
    families = ("pixel", "sd", "latent_consistency", "sdxl", "sd3", "flux", "pixart", "wan")
    not_on: ClassVar[dict[str, str]] = {
        **begins_with_its_own("lvtino"),
        "*ImageToVideo*": "it is shown a picture of its own; the measurement is lvtino's",
        "*VideoToVideo*": "it begins with a video of its own; the measurement is lvtino's",
        "*VACE*": "it is shown a video of its own; the measurement is lvtino's",
        "LucyEdit*": "it edits a video of its own; the measurement is lvtino's",
    }
    Config = LvtinoConfig
    State = Found
    neutral: ClassVar[dict[str, Any]] = {"problem": None}
    active: ClassVar[dict[str, Any]] = {"guided": True, "gamma": 0.2, "end": "prediction", "image": None}  # any call; the model shows
    effects = Effects(
        replaces=frozenset({"scheduler"}),
        edits=frozenset({"latents", "schedule"}),
        needs=frozenset({"own_steps", "all_blocks"}),  # each level is asked about new noise
        stochastic=True,
    )
    needs = (Need("problem", "problem"), Need("pipeline", "image", families=FAMILIES))
    config: LvtinoConfig

    def __init__(self, **knobs: Any) -> None:
        super().__init__(**knobs)
        if self.config.times is None:
            self.effects = replace(type(self).effects, edits=frozenset({"latents"}))

    def check(self, target: Target) -> None:
        problem: Problem | None = target.given.get("problem")
        if problem is None:
            return
        pipe, family = target.pipe, target.family
        ensure_decodes(pipe, family, float32=True)
        known_kind(family, pipe.scheduler, self.name)
        if not problem.operator.linear:
            raise Unsupported(
                f"lvtino: {type(problem.operator).__name__} is not linear, and has no proximal map: take red_diff, which asks A and its "
                "gradient only"
            )
        video = family.latents == "bcfhw"
        if video != (len(problem.shape) == 5):
            made = "videos [n, c, frames, h, w]" if video else "pictures [n, c, h, w]"
            raise ConfigError(f"lvtino: problem is of {list(problem.shape)}, and {type(pipe).__name__} makes {made}")
        each = int(getattr(pipe, "vae_scale_factor_temporal", 1))
        if video and (problem.shape[2] - 1) % each:
            raise ConfigError(
                f"lvtino: problem is of {problem.shape[2]} frames, and the autoencoder of {type(pipe).__name__} takes {each} k + 1: "
                f"{problem.shape[2] // each * each + 1}, say"
            )
        if (second := target.given.get("image")) is not None:
            ensure_image_model(second, problem, self.config.image_times)

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.problem is None:
            return next(call)
        ensure_one_call_a_step(self.name, call.family, call.pipe.scheduler)
        if not self.config.guided:
            call = unguided(call, "guided=True, for a model that wants it")
        if self.config.times is not None:
            ensure_own_levels(call, "times=None")
            call = in_steps(call, len(self.config.times), "times=None")
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        if idle := idle_knobs(self.config):
            call.note(f"without effect here: {', '.join(idle)} (image = {self.config.image!r}, gamma = {self.config.gamma!r})")
        self._remark(call, call.pipe, "this pipeline")
        second = call.given("image")
        if second is not None:
            self._remark(call, second, "image")
            call.shared.image = ImageModel.of(call, second, call.given("problem"), self.config.image_prompt)
        return next(call)

    def _remark(self, call: RunCall, pipe: Any, who: str) -> None:
        """Say that nothing shows the model to be one of few steps."""
        denoiser = next(iter(denoisers_of(pipe, find_family(type(pipe))).values()))
        knows = type(pipe.scheduler).__name__ in FEW_STEP or denoiser.config.get("time_cond_proj_dim")
        if not (knows or self.config.few_step):
            call.note(
                f"nothing says that {who} is a few-step model ({type(pipe.scheduler).__name__}): predictions of others at high noise are "
                "blurred means, and so is the result; where its weights or a LoRA on them are distilled, say few_step=True"
            )

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        times, scheduler = self.config.times, call.scheduler
        if times is None or self.config.problem is None:
            return own
        flow = is_flow(call.family, scheduler)
        most = int(scheduler.config.num_train_timesteps)
        whole = all(t == int(t) for t in times)
        if not (max(times) <= most and min(times) > 0 if flow else max(times) < most and whole):
            takes = f"above 0 and up to {most}" if flow else f"whole numbers from 0 to {most - 1}"
            raise ConfigError(f"lvtino: times = {times}: those of {type(scheduler).__name__} are {takes}")
        return Schedule(*schedule_at(times, own.timesteps, own.sigmas, scheduler, flow))

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.problem is None:
            return next(call)  # type: ignore[no-any-return]
        found: Found = call.shared
        if found.problem is None:
            found.start = self._start(call, found)
        if found.start is not None:
            call = call.with_latents(found.start.to(call.sample.dtype))
        return next(call)  # type: ignore[no-any-return]

    def _start(self, call: DenoiseCall, found: Found) -> Tensor:
        """a E(prox(0; y)) + s eps, with the pipeline's own noise."""
        problem = problem_of(call, self.name)
        if long := too_long(self.config, call.step.total, self._end(call)):
            call.note(f"longer than a run of {call.step.total} steps: {', '.join(long)}")
        zero = torch.zeros(problem.shape, device=problem.y.device)
        pixels = problem.operator.prox(zero, problem.y, self.config.start_gamma).clamp(-1, 1)
        z = first_guess(call, problem, self.name, pixels)
        found.problem = problem
        a, s = levels_of(call)
        return a * z + s * unit_noise(call)

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)  # so that the scheduler knows where it is
        found: Found = call.shared
        if found.problem is None:
            return out
        found.start = None
        levels, kind = levels_of(call), prediction_kind(call.family, call.scheduler)
        z = x0 = clean_estimate(call.sample.float(), call.model_output.float(), levels, kind)
        ends = call.step.ends_schedule
        after = None if ends else levels_next(call)
        if not ends or self._end(call) == "prox":
            z = self._measured(call, x0, levels, after)
        call.acted()
        dtype = out.sample.dtype
        if after is None:
            call.record({"residual": found.problem.residual(pixels_of(call, z))})
            return StepOutput(z.to(dtype), z.to(dtype))  # latent consistency pipelines decode the second
        return StepOutput((after.a * z + after.s * call.noise()).to(dtype), x0.to(dtype))

    def _end(self, call: DenoiseCall | StepCall) -> str:
        return self.config.end or ("prediction" if call.family.latents == "bcfhw" else "prox")

    def _measured(self, call: StepCall, x0: Tensor, levels: SignalNoise, after: SignalNoise | None) -> Tensor:
        """E of what the proximal steps make of D(x0): that of this step, and that of the image model's before the next one."""
        found, k, knobs = call.shared, call.step.index, self.config
        problem: Problem = found.problem
        x = pixels_of(call, x0).clamp(-1, 1)
        better = problem.operator.prox(x, problem.y, self._gamma(knobs.gamma, k, levels, problem)).clamp(-1, 1)
        if found.image is not None and after is not None:
            said, level = found.image.step(call, better, after, knobs.image_times, k + 1)
            gamma = self._gamma(knobs.image_gamma, k + 1, level, problem)
            better = problem.operator.prox(said.clamp(-1, 1), problem.y, gamma).clamp(-1, 1)
        z = latents_of(call, better)
        return z if knobs.encoding == "plain" else x0 + z - latents_of(call, x)

    def _gamma(self, said: Several | None, k: int, levels: SignalNoise, problem: Problem) -> float | Tensor:
        """What is said of step ``k``, or LATINO's rule."""
        if said is None:
            return gamma_of(at_step(several(self.config.delta), k), levels.a, levels.s, problem.noise)
        return at_step(several(said), k)


def several(value: Several) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
