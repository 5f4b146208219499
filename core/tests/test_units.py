"""A scheduler that takes the place of the pipeline's own speaks its unit: towards users, callbacks, other pipelines and hooks."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.predictions import levels_at
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from probes import Effects, Probe, generate, tiny

MEAN, SPREAD = 0.6, 0.8
"""Of the Gaussian data whose exact denoiser these pipelines get."""


class Preserving(Probe):
    """Brings a scheduler of variance-preserving samples, which knows nothing of units."""

    name = "preserving"
    effects = Effects(replaces=frozenset({"scheduler"}))
    scheduler = DDIMScheduler
    changes: ClassVar[dict[str, Any]] = {"clip_sample": False}

    def make_scheduler(self, old, family):
        return self.scheduler.from_config(old.config, **self.changes)


class Exploding(Preserving):
    """One of variance-exploding samples."""

    name = "exploding"
    scheduler = EulerDiscreteScheduler
    changes: ClassVar[dict[str, Any]] = {}


class MultiStep(Preserving):
    """One with sigmas of its own and another spacing."""

    name = "multi_step"
    scheduler = DPMSolverMultistepScheduler
    changes: ClassVar[dict[str, Any]] = {"timestep_spacing": "trailing"}


OWN = {
    "Euler": (EulerDiscreteScheduler, {"timestep_spacing": "leading"}),
    "Euler Karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Heun": (HeunDiscreteScheduler, {}),
    "DPM++": (DPMSolverMultistepScheduler, {}),
    "DDIM": (DDIMScheduler, {"clip_sample": False}),
    "PNDM": (PNDMScheduler, {"skip_prk_steps": True}),
}


def exact(name: str, own: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline under this scheduler, whose U-Net answers as the best one for N(MEAN, SPREAD^2) does."""
    pipe, kwargs = tiny(name)
    cls, options = OWN[own]
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **options)
    abar = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod.double()
    table, kind = (1 / abar - 1).sqrt().log().numpy(), pipe.scheduler.config.prediction_type

    def forward(sample, timestep, *args, **kwargs):
        ratio = math.exp(np.interp(float(torch.as_tensor(timestep).flatten()[0]), np.arange(len(table)), table))
        a = (1 + ratio**2) ** -0.5
        s, x = ratio * a, sample[:, :4].double()
        eps = s * (x - a * MEAN) / (a * a * SPREAD**2 + s * s)
        x0 = (x - s * eps) / a
        return ({"epsilon": eps, "v_prediction": a * eps - s * x0, "sample": x0}[kind].to(sample.dtype),)

    pipe.unet.forward = forward
    return pipe, {k: v for k, v in kwargs.items() if k not in ("image", "strength", "mask_image")} | {"output_type": "latent"}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("plugin", [Preserving, Exploding, MultiStep])
@pytest.mark.parametrize("where", ["base", "refiner"])
def test_latents_go_from_pipeline_to_pipeline(own, plugin, where):
    """SDXL's base and refiner, one of them with another scheduler in its place, against the plain pair."""
    base, refiner = exact("StableDiffusionXLPipeline", own), exact("StableDiffusionXLImg2ImgPipeline", own)

    def pair():
        half = generate(*base, num_inference_steps=40, denoising_end=0.6)
        return half, generate(*refiner, num_inference_steps=40, denoising_start=0.6, image=half)

    half, whole = pair()
    load_pipeline((base if where == "base" else refiner)[0], plugins=[plugin])
    if own == "Euler Karras" and plugin is Preserving:  # DDIM moves between whole timesteps only
        with pytest.raises(Unsupported, match="DDIMScheduler moves between falling whole timesteps"):
            pair()
        return
    other_half, other_whole = pair()
    assert float((other_half - half).square().mean().sqrt() / half.std()) < 0.03
    assert float((other_whole - whole).square().mean().sqrt()) < 0.06, "solver error"


@pytest.mark.parametrize("own", ["Euler", "DDIM"])
@pytest.mark.parametrize("plugin", [Preserving, Exploding])
def test_callbacks_and_hooks_see_the_own_unit(own, plugin):
    """At every step the latents are as wide as the Gaussian says, in the pipeline's own unit; their levels fit to them."""
    pipe, kwargs = exact("StableDiffusionPipeline", own)
    seen = []

    class Look(Probe):
        name = "look"
        effects = Effects(edits=frozenset({"latents"}))

        def denoise(self, call, next):
            a, s = levels_at(call.family, call.pipe.scheduler, call.step.t, call.step.sigma, call.latents.device)
            seen.append((float((call.latents - a * MEAN).std()), float((a * a * SPREAD**2 + s * s).sqrt())))
            return next(call)

        def step(self, call, next):
            a, s = levels_at(call.family, call.scheduler, call.step.t, call.step.sigma, call.sample.device)
            seen.append((float((call.sample - a * MEAN).std()), float((a * a * SPREAD**2 + s * s).sqrt())))
            return next(call)

    def callback(pipe, step, t, tensors):
        seen.append((float(tensors["latents"].std()),) * 2)
        return {}

    load_pipeline(pipe, plugins=[Look, plugin])
    generate(pipe, kwargs, num_inference_steps=20, height=128, width=128, callback_on_step_end=callback)
    for found, wanted in seen:
        assert found == pytest.approx(wanted, rel=0.08)
    assert (seen[0][0] > 5) == (own == "Euler")
    assert seen[2][0] == pytest.approx(seen[3][0], rel=0.02), "what the callback sees is what the next call gets"


NAMES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given", [False, True])
def test_a_translated_run_is_the_solvers_own_run(name, given):
    """DDIM in Euler's place equals DDIM on the pipeline, up to the unit of what comes out; with the user's own latents too."""
    pipe, kwargs = tiny(name)
    kwargs = {**kwargs, "num_inference_steps": 6, "output_type": "latent"}
    if given and "strength" not in kwargs:
        kwargs["latents"] = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = {"clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": True}  # inpainting ends in x0 itself
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, **options)
    pipe.scheduler = ddim
    wanted = generate(pipe, kwargs)
    pipe.scheduler = EulerDiscreteScheduler.from_config(ddim.config)
    load_pipeline(pipe, plugins=[Preserving])
    torch.testing.assert_close(generate(pipe, kwargs), wanted, rtol=0, atol=1e-4)
    assert "Euler" in type(pipe.scheduler).__name__


def test_half_precision_is_not_rounded_twice():
    """In bfloat16 the solver gets its own tensor back, where nobody edited it."""
    got, gave = [], []

    class Watching(DDIMScheduler):
        def step(self, model_output, timestep, sample, *args, **kwargs):
            got.append(sample)
            out = super().step(model_output, timestep, sample, *args, **kwargs)
            gave.append(out[0])
            return out

    class Watched(Preserving):
        name = "watched"
        scheduler = Watching

    pipe, kwargs = exact("StableDiffusionPipeline", "Euler")
    pipe.to(torch.bfloat16)
    load_pipeline(pipe, plugins=[Watched])
    generate(pipe, kwargs, num_inference_steps=5)
    assert all(torch.equal(a, b) for a, b in zip(got[1:], gave, strict=False))


def test_the_plugins_object_stays_as_it_was():
    """A plugin may hand out a scheduler that is somebody's; the run has a twin."""
    pipe, kwargs = exact("StableDiffusionPipeline", "Euler")
    theirs = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)

    class Theirs(Preserving):
        name = "theirs"

        def make_scheduler(self, old, family):
            return theirs

    before = dict(theirs.__dict__)
    load_pipeline(pipe, plugins=[Theirs])
    first = generate(pipe, kwargs)
    assert type(theirs) is DDIMScheduler
    assert theirs.__dict__.keys() == before.keys()
    assert torch.equal(generate(pipe, kwargs), first)


@pytest.mark.parametrize(("argument", "value"), [("timesteps", [900, 500, 100]), ("sigmas", [10.0, 1.0, 0.0])])
def test_a_schedule_of_the_users_that_the_new_scheduler_does_not_take_is_refused(argument, value):
    pipe, kwargs = exact("StableDiffusionPipeline", "Euler")
    load_pipeline(pipe, plugins=[Preserving])
    with pytest.raises(Unsupported, match=rf"preserving: {argument} = .* was given, but DDIMScheduler.*take preserving off"):
        generate(pipe, kwargs, **{argument: value})
    with pytest.raises(ConfigError, match="timesteps and sigmas were both given"):
        generate(pipe, kwargs, timesteps=[900, 100], sigmas=[10.0, 0.0])
    unload(pipe)
    assert generate(pipe, kwargs, **{argument: value}).isfinite().all()


def test_eta_without_effect_is_noted():
    pipe, kwargs = exact("StableDiffusionPipeline", "DDIM")
    load_pipeline(pipe, plugins=[MultiStep])
    generate(pipe, kwargs, eta=0.5)
    assert pipe.plugins.report().plugins["multi_step"].notes == ["eta = 0.5 is without effect: DPMSolverMultistepScheduler draws no noise"]


def test_a_scheduler_whose_levels_are_not_known_cannot_be_translated():
    class Mute(Preserving):
        name = "mute"

        def make_scheduler(self, old, family):
            new = super().make_scheduler(old, family)
            del new.alphas_cumprod
            return new

    pipe, kwargs = exact("StableDiffusionPipeline", "Euler")
    load_pipeline(pipe, plugins=[Mute])
    with pytest.raises(Unsupported, match="neither sigmas nor alphas_cumprod"):
        generate(pipe, kwargs)
