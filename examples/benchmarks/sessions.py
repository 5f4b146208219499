"""What a session costs a denoiser call, and a plugin a step of a scheduler's copy: CPU time of the main thread.

    python examples/benchmarks/sessions.py [--rounds 60] [--steps 50] [--out FILE]

The denoiser is a stand-in that answers at once, so that what is measured is the way to it and back.

run           a denoiser call of a run with a plugin that hands it on (its scheduler step too), beside one of the same run without
session       a denoiser call of a session with that plugin, beside a bare call
copy          a step of a copy of the scheduler in a run with that plugin, beside the same without
copy, hooked  the same with a plugin that also hands on steps

--out writes JSON.
"""

from __future__ import annotations

import copy
import functools
import json
import platform
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import diffgraft
import torch
import typer
from diffgraft import Paper, Plugin, load_pipeline
from diffgraft_pipelines.tiny import make
from diffusers import DDIMScheduler, StableDiffusionPipeline


class HandsOn(Plugin):
    """Hands every call on."""

    name = "hands_on"
    paper = Paper("none", "", "nothing")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def denoise(self, call: Any, next: Any) -> Any:
        return next(call)


class HandsOnSteps(HandsOn):
    """Steps too."""

    name = "hands_on_steps"

    def step(self, call: Any, next: Any) -> Any:
        return next(call)


def answers_at_once(model: Any) -> None:
    """Let a denoiser give back what it gets."""

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return (args[0],)

    model.forward = types.MethodType(forward, model)


def extra(work: Callable[[], Any], plain: Callable[[], Any], rounds: int) -> float:
    """CPU seconds that ``work`` takes longer than ``plain``; the two take turns."""

    def timed(which: Callable[[], Any]) -> float:
        started = time.thread_time()
        which()
        return time.thread_time() - started

    pairs = [(timed(work), timed(plain)) for _ in range(rounds)]
    return min(each for each, _ in pairs) - min(each for _, each in pairs)


def tiny() -> Any:
    """A Stable Diffusion whose denoiser answers at once."""
    pipe = make("StableDiffusionPipeline").pipe
    pipe.set_progress_bar_config(disable=True)
    answers_at_once(pipe.unet)
    return pipe


def in_run(steps: int, rounds: int) -> float:
    """CPU seconds that a denoiser call takes longer in a run with a plugin than in one without; the scheduler's step is in it."""
    hooked, plain = tiny(), tiny()
    load_pipeline(hooked, plugins=[HandsOn])
    works = [lambda pipe=pipe: pipe("x", num_inference_steps=steps, output_type="latent") for pipe in (hooked, plain)]
    return extra(*works, rounds) / steps


class Still(DDIMScheduler):
    """Goes nowhere."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        return (sample,)


class Copies(StableDiffusionPipeline):
    """Steps a copy of its scheduler, and keeps how long each step took."""

    seconds: ClassVar[list[float]] = []

    def __call__(self, num_inference_steps: int = 50, generator: Any = None, output_type: str = "latent") -> Any:
        self._guidance_scale = 1.0
        self.scheduler.set_timesteps(num_inference_steps)
        each = copy.deepcopy(self.scheduler)
        x, hidden = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, self.unet.config.cross_attention_dim)
        for t in self.scheduler.timesteps:
            out = self.unet(x, t, encoder_hidden_states=hidden, return_dict=False)[0]
            started = time.thread_time()
            x = each.step(out, t, x, return_dict=False)[0]
            self.seconds.append(time.thread_time() - started)
        return (x,)


def copied(plugins: list[type[Plugin]], steps: int, rounds: int) -> float:
    """CPU seconds of a step of a scheduler's copy, the median."""
    parts = tiny().components
    pipe = Copies(**{**parts, "scheduler": Still.from_config(parts["scheduler"].config)}, requires_safety_checker=False)
    load_pipeline(pipe, plugins=plugins)
    pipe(steps)
    Copies.seconds.clear()
    for _ in range(rounds):
        pipe(steps)
    if HandsOnSteps in plugins:
        assert pipe.plugins.report().plugins["hands_on_steps"].fired["step"] == steps
    return statistics.median(Copies.seconds)


def session(steps: int, rounds: int) -> float:
    """CPU seconds that a denoiser call takes longer in a session than outside."""
    pipe, plain = tiny(), tiny()
    pipe.scheduler.set_timesteps(steps)
    x, hidden = torch.zeros(1, 4, 8, 8), torch.zeros(1, 7, pipe.unet.config.cross_attention_dim)
    times = list(pipe.scheduler.timesteps)

    def bare() -> None:
        for t in times:
            plain.unet(x, t, hidden, return_dict=False)

    load_pipeline(pipe, plugins=[HandsOn])
    with pipe.plugins.session({"guidance_scale": 7.5}, scheduler=pipe.scheduler) as entered:

        def calls() -> None:
            for index, t in enumerate(times):
                entered.at(index)
                entered.model(x, t, hidden, return_dict=False)

        calls()
        bare()
        seconds = extra(calls, bare, rounds)
        assert entered.report.plugins["hands_on"].fired["denoise"] >= rounds * steps
    return seconds / steps


def main(
    rounds: Annotated[int, typer.Option(min=1)] = 60,
    steps: Annotated[int, typer.Option(min=2)] = 50,
    out: Annotated[Path | None, typer.Option(help="write the numbers here as JSON")] = None,
) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        found = {"run": in_run(steps, rounds), "session": session(steps, rounds)}
        plain = copied([], steps, rounds)
        found |= {"copy": copied([HandsOn], steps, rounds) - plain, "copy, hooked": copied([HandsOnSteps], steps, rounds) - plain}
    for what, seconds in found.items():
        print(f"{what}: {seconds * 1e6:.1f} us")
    if out:
        versions = {"diffgraft": diffgraft.__version__, "torch": torch.__version__, "python": platform.python_version()}
        out.write_text(json.dumps({"versions": versions, "rounds": rounds, "steps": steps, "seconds": found}, indent=1))


if __name__ == "__main__":
    typer.run(main)
