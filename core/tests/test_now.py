"""What a run tells of itself: to exchanged modules, in its report, and when a pipeline steps copies of its scheduler."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import Conflict, PluginNotFound, Unsupported, load_pipeline, now, unload
from diffgraft.kernel.calls import Schedule
from diffgraft.methods.gradients import latent_gradient, predict_alone
from diffgraft.methods.rewards import asking_pipeline
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from probes import Effects, Everything, Probe, generate, tiny, trace
from torch import nn

SD, FLUX = "StableDiffusionPipeline", "FluxPipeline"


# exchanged modules ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    at: list = field(default_factory=list)


class Asking(nn.Module):
    def __init__(self, inner: nn.Module, tells: bool = False) -> None:
        super().__init__()
        self.inner, self.tells = inner, tells

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = now()
        if run is not None and self.tells:
            run.shared("asks").at.append((run.step.index, run.branch, run.state("asks") is not run.shared("asks")))
        return self.inner(*args, **kwargs)


class Asks(Probe):
    """Has no hook but the exchange."""

    name = "asks"
    State = Seen
    effects = Effects(edits=frozenset({"weights"}))
    told: ClassVar[list] = []

    def modules(self, call, next):
        for denoiser in call.denoisers.values():
            name = next_name(denoiser)
            call.swap(denoiser, name, Asking(getattr(denoiser, name), tells=True))

    def run(self, call, next):
        out = next(call)
        self.told[:] = call.shared.at
        return out


def next_name(denoiser: nn.Module) -> str:
    return "conv_in" if hasattr(denoiser, "conv_in") else "x_embedder"


@pytest.mark.parametrize(("name", "branches"), [(SD, ["both"] * 3), (FLUX, ["cond", "uncond"] * 3)])
def test_an_exchanged_module_knows_where_it_is(name, branches):
    pipe, kwargs = tiny(name)
    kwargs = {**kwargs, "num_inference_steps": 3, "output_type": "latent"}
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Asks])
    assert torch.equal(generate(pipe, kwargs), plain)
    per_step = len(branches) // 3
    assert Asks.told == [(i // per_step, branch, True) for i, branch in enumerate(branches)]
    assert now() is None


def test_outside_and_in_callbacks_there_is_no_run(sd):
    pipe, kwargs = sd
    told = []

    class Here(Probe):
        name = "here"

        def denoise(self, call, next):
            told.append((now().step.index, now().branch))
            with pytest.raises(PluginNotFound, match="'nobody' is not part of this run; in it: here"):
                now().shared("nobody")
            return next(call)

    load_pipeline(pipe, plugins=[Here])
    generate(pipe, {**kwargs, "num_inference_steps": 2}, callback_on_step_end=lambda *_: told.append(now()) or {})
    assert told == [(0, "both"), None, (1, "both"), None]


def exchanging(name: str, where: Any) -> type[Probe]:
    """A plugin that exchanges the module that ``where(denoiser)`` names as (parent, name), for one that wraps or copies it."""

    def modules(self: Any, call: Any, next: Any) -> None:
        for denoiser in call.denoisers.values():
            parent, key, make = where(denoiser)
            call.swap(parent, key, make(getattr(parent, key)))

    return type(name, (Probe,), {"name": name, "modules": modules})


def test_two_plugins_cannot_exchange_one_module(sd):
    pipe, _ = sd
    before = trace(pipe)
    outer = exchanging("outer", lambda unet: (unet, "conv_in", Asking))
    same = exchanging("same", lambda unet: (unet, "conv_in", Asking))
    with pytest.raises(Conflict, match="same and outer both exchange 'conv_in' of a UNet2DConditionModel"):
        load_pipeline(pipe, plugins=[outer, same])
    assert trace(pipe) == before
    brought = exchanging("brought", lambda unet: (unet, "time_embedding", copy.deepcopy))
    inside = exchanging("inside", lambda unet: (unet.time_embedding, "linear_1", Asking))
    with pytest.raises(Conflict, match="inside and brought both exchange 'linear_1'"):
        load_pipeline(pipe, plugins=[brought, inside])
    assert trace(pipe) == before


def test_an_exchange_inside_what_another_only_wraps_is_fine(sd):
    pipe, kwargs = sd
    plain, before = generate(pipe, kwargs), trace(pipe)
    wrapping = exchanging("wrapping", lambda unet: (unet, "time_embedding", Asking))

    def within(unet: Any) -> Any:
        part = unet.time_embedding
        return getattr(part, "inner", part), "linear_1", Asking

    for order in ([wrapping, exchanging("within", within)], [exchanging("within", within), wrapping]):
        load_pipeline(pipe, plugins=order)
        assert torch.equal(generate(pipe, kwargs), plain)
        unload(pipe)
        assert trace(pipe) == before


# forwards ------------------------------------------------------------------------------------------------------------------------------


def test_forwards_are_those_that_really_ran(sd):
    pipe, kwargs = sd

    class Mixed(Probe):
        name = "mixed"
        effects = Effects(skips=frozenset({"denoiser"}), edits=frozenset({"latents"}))

        def denoise(self, call, next):
            if call.step.index == 1:  # twice
                next(call)
            if call.step.index == 2:
                return torch.zeros_like(call.sample)
            if call.step.index == 3:  # a gradient of the conditional branch
                latent_gradient(call, lambda z: predict_alone(call.only("cond").with_input(z)).square().flatten(1).mean(1))
            return next(call)

    load_pipeline(pipe, plugins=[Mixed])
    generate(pipe, {**kwargs, "num_inference_steps": 5})
    report = pipe.plugins.report()
    assert report.denoiser_calls == {"both": 5}
    assert report.forwards == {"both": 5, "cond": 1}
    assert "denoiser calls: both 5, really run: both 5, cond 1" in str(report)


# copies of the scheduler ---------------------------------------------------------------------------------------------------------------


SCHEDULERS = (UniPCMultistepScheduler, DPMSolverMultistepScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler)


class Parts(StableDiffusionPipeline):
    """Steps a copy of its scheduler for each of two parts of the latents, and not its own, as SkyReels does for frames."""

    own = False

    @torch.no_grad()
    def __call__(self, prompt: str = "", num_inference_steps: int = 4, generator: Any = None, output_type: str = "latent") -> Any:
        self._guidance_scale = 1.0
        draws = self.prepare_extra_step_kwargs(generator, 0.0)
        hidden = self.text_encoder(torch.arange(7)[None])[0]
        self.scheduler.set_timesteps(num_inference_steps)
        self._num_timesteps = num_inference_steps
        copies = []
        for _ in range(2):
            copies.append(copy.deepcopy(self.scheduler))
            copies[-1].set_timesteps(num_inference_steps)
        latents = torch.randn((1, 4, 8, 8), generator=generator) * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(latents, t)
            for each in copies:
                each.scale_model_input(latents, t)
            out = self.unet(given, t, encoder_hidden_states=hidden, return_dict=False)[0]
            first = self.scheduler if self.own else copies[0]  # LTX-2: its own for the video, a copy for the sound
            upper = first.step(out[:, :, :4], t, latents[:, :, :4], **draws, return_dict=False)[0]
            lower = copies[1].step(out[:, :, 4:], t, latents[:, :, 4:], **draws, return_dict=False)[0]
            latents = torch.cat([upper, lower], dim=2)
        self.copies = copies
        return (latents,)


class OwnAndSound(Parts):
    own = True


def parts(cls: Any, scheduler: Any) -> Any:
    pipe = tiny(SD)[0]
    made = cls(**pipe.components, requires_safety_checker=False)
    made.scheduler = scheduler.from_config(pipe.scheduler.config)
    return made


@dataclass
class Steps:
    seen: list = field(default_factory=list)


class Watches(Everything):
    name = "watches"
    State = Steps
    told: ClassVar[list] = []

    def run(self, call, next):
        out = next(call)
        self.told[:] = call.shared.seen
        return out

    def step(self, call, next):
        call.shared.seen.append((call.step.index, call.copy, call.scheduler is not call.pipe.scheduler))
        return next(call)


@pytest.mark.parametrize("cls", [Parts, OwnAndSound])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_copies_step_themselves_and_are_seen(cls, scheduler):
    def run(pipe: Any) -> Any:
        return pipe(generator=torch.Generator().manual_seed(0))[0]

    pipe = parts(cls, scheduler)
    plain = run(pipe)
    load_pipeline(pipe, plugins=[Watches])
    assert torch.equal(run(pipe), plain)
    first = (0, False) if cls.own else (1, True)
    assert Watches.told == [(index, *which) for index in range(4) for which in (first, (2, True))]
    assert pipe.plugins.report().steps == 4
    for each in pipe.copies:  # nothing of ours stays on them, and they are whole
        assert "step" not in vars(each)
        pickle.loads(pickle.dumps(each)).step  # noqa: B018
    unload(pipe)
    assert torch.equal(run(pipe), plain)


def test_an_answer_of_a_copys_step_reaches_the_pipeline():
    class Zero(Probe):
        name = "zero"

        def step(self, call, next):
            out = next(call)
            return type(out)(out.sample * 0, out.x0) if call.copy == 2 and call.step.is_last else out

    pipe = parts(Parts, DDIMScheduler)
    load_pipeline(pipe, plugins=[Zero])
    latents = pipe(generator=torch.Generator().manual_seed(0))[0]
    assert latents[:, :, 4:].abs().max() == 0
    assert latents[:, :, :4].abs().max() > 0


def test_what_a_plugin_changes_elsewhere_does_not_reach_copies_and_is_refused():
    class Cuts(Probe):
        name = "cuts"
        effects = Effects(edits=frozenset({"schedule"}))

        def schedule(self, call, next):
            made = next(call)
            return Schedule(made.timesteps[1:], None if made.sigmas is None else made.sigmas[1:])

    class Edits(Probe):
        name = "edits"
        effects = Effects(edits=frozenset({"latents"}))

        def denoise(self, call, next):
            return next(call.with_latents(call.latents * 0.5))

    for plugin, what in ((Cuts, "schedule"), (Edits, "latents")):
        pipe = parts(Parts, DDIMScheduler)
        load_pipeline(pipe, plugins=[plugin])
        with pytest.raises(Unsupported, match=f"what a plugin changed in the {what} does not reach them"):
            pipe()


def test_a_users_copy_in_a_callback_is_plain():
    """As before: only what the pipeline itself copies is a part of the run."""
    pipe, kwargs = tiny(SD)
    made = []
    load_pipeline(pipe, plugins=[Watches])
    generate(pipe, kwargs, callback_on_step_end=lambda pipe, *_: made.append(copy.deepcopy(pipe.scheduler)) or {})
    assert all("step" not in vars(each) or not hasattr(vars(each)["step"], "target") for each in made)
    out = made[0].step(torch.zeros(1, 4, 8, 8), made[0].timesteps[1], torch.ones(1, 4, 8, 8))
    assert out.prev_sample.shape == (1, 4, 8, 8)


def test_a_reward_learns_which_pipeline_asks():
    pipe, kwargs = tiny(SD)
    asked = []

    class Judges(Probe):
        name = "judges"

        def step(self, call, next):
            asked.append(asking_pipeline())
            return next(call)

    load_pipeline(pipe, plugins=[Judges])
    generate(pipe, kwargs, callback_on_step_end=lambda *_: asked.append(asking_pipeline()) or {})
    assert asked[:2] == [pipe, None]
    assert asking_pipeline() is None
