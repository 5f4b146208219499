"""The base's own part of a run (N_B steps of its schedule down to the handoff), and the x0 estimate of a step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, DenoiseCall, Effects, Paper, Plugin, Step, StepCall, StepOutput, load_pipeline
from diffgraft.methods.adapters import adapter_layers, without_adapters
from diffgraft.methods.conditioning import NOT_COPIED, Conditioning, own_conditioning, sibling
from diffgraft.methods.predictions import clean_estimate, is_exploding, levels_at, prediction_kind
from torch import Tensor

from diffgraft_diversity_distillation.method import handoff, rescaled, scale_of

MEMORIES = ("model_outputs", "ets", "derivatives")
"""Where diffusers' multistep schedulers keep the predictions of earlier steps."""


def steps_once(scheduler: Any, strictly: bool = True) -> bool:
    """Whether a step of this scheduler is one denoiser call and (``strictly``) needs none before it."""
    return getattr(scheduler, "order", 1) == 1 and not (strictly and any(hasattr(scheduler, name) for name in MEMORIES))


def estimate(call: StepCall) -> Tensor:
    """x0-hat of a step, as the latents are laid out: what the model takes the finished sample to be (DT-visualisation)."""
    scheduler, x = call.scheduler, call.sample
    levels = levels_at(call.family, scheduler, call.step.t, call.step.sigma, x.device)
    return clean_estimate(x, call.model_output, levels, prediction_kind(call.family, scheduler))


@dataclass
class Part:
    """What the base did: its latents (at the scale of the other scheduler), its last prediction, x0 estimates, and how much it ran."""

    latents: Any = None
    prediction: Any = None
    estimates: list[Tensor] = field(default_factory=list)
    steps: int = -1
    """j: how many steps it makes, in ``scheduler.step`` calls until it has made them; -1 until its schedule is known."""
    total: int = 0
    forwards: int = 0


class Ended(Exception):  # the base's way out at the handoff, not an error
    def __init__(self, part: Part, at: Step) -> None:
        self.part = part
        self.at = at


def runner_of(base: Any, pipe: Any) -> Any:
    """The pipeline to call for the base (None: ``pipe``) while ``pipe`` runs: one with another scheduler, which ``from_pipe`` may share."""
    return sibling(base or pipe, pipe.scheduler) if base is None or base.scheduler is pipe.scheduler else base


def listen(base: Any, pipe: Any, arguments: Mapping[str, Any]) -> Conditioning:
    """What the base makes of the prompt, while ``pipe`` runs."""
    return own_conditioning(runner_of(base, pipe), arguments)


def first_part(base: Any, arguments: Mapping[str, Any], steps: int, preview: bool, call: DenoiseCall, until: Step | None) -> Part:
    """Run the base from the noise of the run in progress down to the handoff.

    Args:
        base: its pipeline, or None for the running one with its LoRA off.
        arguments: of its call; steps: N_B; preview: whether to keep x0 estimates.
        call: the first denoiser call of the run in progress; until: step k of that run, None when the base makes all of it.

    Raises:
        ConfigError: the handoff comes before the base's first step.
    """
    pipe, device = call.pipe, call.sample.device
    runner = runner_of(base, pipe)
    given = {name: value for name, value in arguments.items() if value is not None and name not in NOT_COPIED}
    if "generator" in (running := call.run.arguments):
        given["generator"] = twin(running["generator"])
    given |= {"latents": call.latents / getattr(pipe.scheduler, "init_noise_sigma", 1.0), "num_inference_steps": steps}
    fresh = not hasattr(runner, "plugins")
    watch = FirstPart(None if until is None else until.t, preview)
    stack = load_pipeline(runner, [watch]).plugins
    try:
        with ExitStack() as off:
            for model in (getattr(runner, name, None) for name in call.family.denoisers):
                if model is not None and model is getattr(pipe, call.model_name) and adapter_layers(model):
                    off.enter_context(without_adapters(model))
            runner(**given, output_type="latent")
        raise AssertionError("the base's run was not ended at the handoff")
    except Ended as end:
        part, at = end.part, end.at
        if until is not None and (is_exploding(pipe.scheduler) or is_exploding(runner.scheduler)):
            old = scale_of(*levels_at(call.family, runner.scheduler, at.t, at.sigma, device))
            new = scale_of(*levels_at(call.family, pipe.scheduler, until.t, until.sigma, device))
            part.latents = rescaled(part.latents, old, new)
        part.latents = part.latents.to(call.latents.dtype)
        return part
    finally:
        stack.clear() if fresh else stack.remove(watch.name)


def twin(generator: Any) -> Any:
    """A generator (or a list of them) in the same state: the run's own must not be drawn from by the base."""
    if isinstance(generator, list):
        return [twin(one) for one in generator]
    return generator if generator is None else torch.Generator(generator.device).set_state(generator.get_state())


class FirstPart(Plugin):
    """Ends the base's run at the handoff and keeps what the other run needs."""

    name = "diversity_distillation base"
    paper = Paper("Distilling Diversity and Control in Diffusion Models", "2503.10637", "the base's part of a run")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    State = Part
    effects = Effects()

    def __init__(self, until: Tensor | None, preview: bool) -> None:
        super().__init__()
        self.until = until
        self.preview = preview

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        part = call.shared
        if part.steps < 0:
            timesteps = call.pipe.scheduler.timesteps
            part.steps, part.total = handoff(timesteps, self.until), call.step.total
            if part.steps == 0:
                raise ConfigError(
                    f"plugin 'diversity_distillation': base_steps = {part.total}: the base's first timestep, {float(timesteps[0]):g}, is "
                    f"the nearest to that of the handoff, {float(self.until or 0):g}, so the base would do nothing; take more base_steps, "
                    "timestep_spacing='trailing' for the base's scheduler, or leave base_steps out"
                )
        part.forwards += len(call.branches)
        prediction = next(call)
        if "cond" in call.branches:
            part.prediction = prediction.chunk(len(call.branches))[call.branches.index("cond")]
        return prediction  # type: ignore[no-any-return]

    def step(self, call: StepCall, next: Any) -> StepOutput:
        part = call.shared
        if self.preview:
            part.estimates.append(estimate(call))
        at = call.step_at(1)
        out: StepOutput = next(call)
        if (call.step.call >= part.steps - 1 and call.step.ends_step) or call.stopped:
            part.steps, part.total, part.latents = call.step.index + 1, call.step.total, out.sample
            raise Ended(part, at)
        return out
