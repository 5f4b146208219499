"""How noisy the latents are that a denoiser is given, against the time that it is told."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.installed.family import Family
from diffgraft.kernel.speech import answer, heard, prediction_of
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.predictions import prediction_kind
from diffgraft.testing.case import check
from diffgraft.testing.runs import artefacts, call
from diffgraft.testing.setting import USUAL
from diffgraft.testing.subject import Subject
from diffgraft.testing.tiny import denoisers

VARIANCE = 0.25
"""Of the Gaussian data whose denoiser is exact."""
FINE = USUAL.but(num_inference_steps=8)
AT_MOST = 1.5
"""How many times too large or too small the latents may be: eight steps are coarse, and a tiny latent is few numbers."""


Pair = tuple[float, float]
FACTORS: dict[str, Callable[[Pair], float]] = {
    "large": lambda pair: pair[0] / pair[1],
    "small": lambda pair: pair[1] / max(pair[0], 1e-12),
}
"""By which factor the first of (seen, expected) is too large or too small."""


def changes_the_sampling(s: Subject) -> bool:
    """Whether the plugin has a say in what a denoiser call is given, or in the time that it is told."""
    plugin = s.plugin
    return bool(plugin.effects.edits & {"latents", "timestep", "schedule"} or plugin.scheduler or "step" in plugin.points())


@check("kind", when=lambda s: changes_the_sampling(s) and s.family.prediction != "consistency" and s.supports(FINE))
def levels(s: Subject) -> None:
    """With an exact Gaussian denoiser the latents are as large as those of the time told (an explicit step across a stiff interval)."""
    plain, pipe = s.make(), s.attach(s.make())
    with exactly_gaussian(denoisers(plain, s.family), s.family, plain.scheduler) as before:
        s.run(plain, FINE)
    models = [model for each in (pipe, *s.seconds(pipe)) for model in denoisers(each, s.family)]
    if knobs := artefacts(s.plugin, s.family, s.class_name, FINE):
        if s.plugin.calibration is not None and "latents" in s.plugin.effects.edits:  # it may measure how large the data are: these, then
            knobs |= dict.fromkeys((need.knob for need in s.plugin.needs if need.kind == "artefact"), measured(s))
        pipe.plugins.configure(s.plugin.name, **knobs)
    with exactly_gaussian(models, s.family, pipe.scheduler) as seen:
        call(pipe, s.family, s.class_name, FINE)
    for what, factor in FACTORS.items():
        allowed = max(AT_MOST, 1.1 * max(map(factor, before)))  # the plain pipeline's steps may be too coarse too
        measures = any(need.kind == "problem" for need in s.plugin.needs)
        if measures and what == "small":
            continue  # what was measured is no draw of these data, and an autoencoder of random weights gives little of it back
        if measures or (what == "small" and s.plugin.effects.edits & {"resolution", "timestep"}):
            allowed *= 2  # resizing averages, and another time may be told on purpose
        worst = max(seen, key=factor)
        assert factor(worst) <= allowed, (
            f"denoiser call {seen.index(worst) + 1} of {len(seen)} was given latents {factor(worst):.3g} times too {what}: of standard "
            f"deviation {worst[0]:.3g}, where data of variance {VARIANCE} have {worst[1]:.3g} at the time told; allowed is {allowed:.3g}"
        )


def measured(s: Subject) -> Any:
    """The plugin's artefact of a pipeline whose denoiser is exact."""
    pipe = s.make()
    with exactly_gaussian(denoisers(pipe, s.family), s.family, pipe.scheduler):
        return calibrate_call(pipe, s.plugin(**s.plugin.active), lambda: call(pipe, s.family, s.class_name, FINE))


@contextlib.contextmanager
def exactly_gaussian(models: Iterable[nn.Module], family: Family, scheduler: Any) -> Iterator[list[Pair]]:
    """The models answer as the exact denoiser of N(0, 1/4) does; what they were given: (standard deviation, that of the time told).

    They still compute, so that hooks inside them are reached.
    """
    seen: list[Pair] = []
    changed = [model for model in dict.fromkeys(models) if "forward" not in model.__dict__]
    for model in changed:
        model.forward = answering(model.forward, family, scheduler, seen)
    try:
        yield seen
    finally:
        for model in changed:
            del model.forward


def answering(forward: Callable[..., Any], family: Family, scheduler: Any, seen: list[Pair]) -> Callable[..., Any]:
    """A denoiser's ``forward`` with the exact answer in the place of its own."""
    signature, kind = inspect.signature(forward), prediction_kind(family, scheduler)

    @functools.wraps(forward)
    def answer(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        bound = signature.bind_partial(*args, **kwargs).arguments
        given = {**bound, **heard(family, bound)}
        x, told = given[family.sample], float(torch.as_tensor(given[family.timestep]).flatten()[0])
        a, s = level((told - family.timestep_offset) / family.timestep_scale, scheduler, kind)
        variance = a * a * VARIANCE + s * s
        seen.append((x.detach().float().std().item(), variance**0.5))
        x0, eps = a * VARIANCE / variance * x, s / variance * x
        exact = {"flow": eps - x0, "epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind]
        return like(out, exact, family)

    return answer


def level(t: float, scheduler: Any, kind: str) -> tuple[float, float]:
    """Signal and noise of what a denoiser is given at a scheduler's timestep, which may lie between two of training."""
    if kind == "flow":
        sigma = t / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    table = scheduler.alphas_cumprod
    low = min(max(int(t), 0), len(table) - 1)
    abar = float(torch.lerp(table[low], table[min(low + 1, len(table) - 1)], min(max(t - low, 0.0), 1.0)))
    return abar**0.5, (1 - abar) ** 0.5


def like(out: Any, exact: Tensor, family: Family) -> Any:
    """``exact`` in the form of a denoiser's output: with a learned sigma, as a tuple or as an output object."""
    wanted, axis = prediction_of(family, out[0]).shape, family.channel_axis
    if exact.shape != wanted:
        exact = exact.narrow(axis, 0, min(exact.shape[axis], wanted[axis]))
        exact = torch.cat([exact, exact.new_zeros(wanted).narrow(axis, exact.shape[axis], wanted[axis] - exact.shape[axis])], dim=axis)
    given = answer(family, exact.to(prediction_of(family, out[0]).dtype))
    return (given, *out[1:]) if isinstance(out, tuple) else type(out)(sample=given)
