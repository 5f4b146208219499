"""Runs that begin in the middle of the schedule, and runs whose beginning is taken from a record."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import ConfigError, Conflict, Unsupported, load_pipeline, unload
from diffgraft.kernel.calls import Schedule
from diffgraft.methods.replay import Record, beginning
from diffgraft.methods.starts import cut, start_from, unit_noise
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from probes import Effects, PluginConfig, Probe, generate, tiny, trace

SD = "StableDiffusionPipeline"
SCHEDULERS = (
    DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler, UniPCMultistepScheduler,
)  # fmt: skip


class Knobs(PluginConfig):
    level: float = 500.0
    z0: Any = None


class From(Probe):
    """Begins at ``level`` with ``z0``."""

    name = "from"
    Config = Knobs
    effects = Effects(edits=frozenset({"schedule", "latents"}))

    def schedule(self, call, next):
        return cut(call, next(call), call.config.level)

    def denoise(self, call, next):
        if call.step.call == 0:
            call = call.with_latents(start_from(call, call.config.z0))
        return next(call)


def begun(pipe, kwargs, z0, level, **more):
    load_pipeline(pipe, plugins=[From(level=level, z0=z0)])
    try:
        return generate(pipe, kwargs, output_type="latent", **more)
    finally:
        unload(pipe)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda cls: cls.__name__)
def test_a_start_is_what_image_to_image_starts_from(scheduler):
    """diffusers' own image-to-image takes 4-channel pictures as latents and draws the same noise."""
    pipe, kwargs = tiny(SD)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    z0 = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    kwargs = {**kwargs, "height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor}
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    sizes = {name: kwargs.pop(name) for name in ("height", "width")}
    wanted = generate(other, {**kwargs, "image": z0, "strength": 0.5, "num_inference_steps": 6}, output_type="latent")
    pipe.scheduler.set_timesteps(6)
    begin = 3 * getattr(pipe.scheduler, "order", 1)
    level = float(pipe.scheduler.timesteps[begin])
    found = begun(pipe, {**kwargs, **sizes, "num_inference_steps": 6}, z0, level)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


def test_packed_flow_latents_start_as_image_to_image_does():
    pipe, kwargs = tiny("FluxPipeline")
    side = pipe.vae_scale_factor * 8
    kwargs = {**kwargs, "height": side, "width": side, "num_inference_steps": 4}
    other = FluxImg2ImgPipeline(**{k: v for k, v in pipe.components.items() if k in FluxImg2ImgPipeline.__init__.__annotations__})
    other.set_progress_bar_config(disable=True)
    other.image_processor.preprocess = lambda image, **sizes: image  # it would take these latents for a picture, and resize them
    channels = pipe.transformer.config.in_channels // 4
    z0 = torch.randn((1, channels, 8, 8), generator=torch.Generator().manual_seed(5))
    wanted = generate(other, {**kwargs, "image": z0, "strength": 0.5}, output_type="latent")
    level = float(other.scheduler.timesteps[2])
    packed = pipe._pack_latents(z0, 1, channels, 8, 8)
    found = begun(pipe, kwargs, packed, level)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(("name", "scheduler"), [*((SD, each) for each in SCHEDULERS), ("DDPMPipeline", EulerDiscreteScheduler)])
def test_the_noise_is_the_pipelines_own(name, scheduler):
    """Also of a pipeline that never scales it, under a scheduler that asks for that."""
    pipe, kwargs = tiny(name)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    seen = []

    def denoise(self, call, next):
        if call.step.call == 0:
            seen.append(unit_noise(call))
        return next(call)

    load_pipeline(pipe, plugins=[type("Look", (Probe,), {"name": "look", "effects": From.effects, "denoise": denoise})])
    generate(pipe, kwargs, output_type="latent" if name == SD else "np")
    drawn = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(seen[0], drawn, atol=1e-6)


@pytest.mark.parametrize("level", [0.0, -3.0, 1001.0, 0.5])
def test_a_level_outside_the_schedule_is_refused(sd, level):
    pipe, kwargs = sd
    plain, before = generate(pipe, kwargs), trace(pipe)
    with pytest.raises(ConfigError, match=rf"from: no step of this run begins at timestep {level:g}"):
        begun(pipe, {**kwargs, "num_inference_steps": 4}, torch.zeros(1), level)
    assert trace(pipe) == before
    assert torch.equal(generate(pipe, kwargs), plain)


def test_a_run_that_begins_with_a_picture_is_refused():
    pipe, kwargs = tiny("StableDiffusionImg2ImgPipeline")
    with pytest.raises(Unsupported, match="from sets where a run begins, but this one begins in the middle of its schedule"):
        begun(pipe, {**kwargs, "num_inference_steps": 6, "strength": 0.7}, torch.zeros(1), 900.0)


def test_a_whole_schedule_stays_the_same_object_slice():
    """At the top nothing is cut, so that schedulers without sigmas keep their plan."""
    times = torch.tensor([999.0, 500.0, 1.0])
    scheduler = SimpleNamespace(config={"num_train_timesteps": 1000}, order=1)
    whole = cut(SimpleNamespace(scheduler=scheduler), Schedule(times, None), 1000)
    assert whole.timesteps.data_ptr() == times.data_ptr()
    assert len(whole.timesteps) == 3


def test_two_starts_are_a_conflict(sd):
    pipe, kwargs = sd
    other = type("Other", (From,), {"name": "other"})
    load_pipeline(pipe, plugins=[other(level=900.0, z0=torch.zeros(1)), From(level=900.0, z0=torch.zeros(1))])
    with pytest.raises(Conflict, match="another plugin, further out, has done so already"):
        generate(pipe, kwargs, output_type="latent")


def test_the_noise_is_not_seen_later(sd):
    pipe, kwargs = sd

    def denoise(self, call, next):
        if call.step.call == 1:
            unit_noise(call)
        return next(call)

    look = type("Look", (Probe,), {"name": "look", "denoise": denoise})
    load_pipeline(pipe, plugins=[look])
    with pytest.raises(Unsupported, match="seen in its first denoiser call alone"):
        generate(pipe, kwargs, output_type="latent")


# a record ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    record: Record = field(default_factory=lambda: Record(3))
    first: bool = True
    asked: list = field(default_factory=list)
    latents: list = field(default_factory=list)


class Chooses(Probe):
    """Three steps of all samples, then a whole run of sample 1 alone, whose first three steps come from the record."""

    name = "chooses"
    State = Kept
    effects = Effects(skips=frozenset({"denoiser"}), edits=frozenset({"schedule"}))
    seen: list

    def run(self, call, next):
        next(call)
        call.shared.first = False
        out = next(call.replace(prompt=call["prompt"][1], generator=torch.Generator().manual_seed(1)))
        self.seen.append(call.shared)
        return out

    def schedule(self, call, next):
        timesteps, sigmas = next(call)
        if not call.shared.first:
            return Schedule(timesteps, sigmas)
        n = 3 * getattr(call.scheduler, "order", 1)
        return Schedule(timesteps[:n], None if sigmas is None else sigmas[: n + 1])

    def denoise(self, call, next):
        kept = call.shared
        if kept.first:
            return kept.record.keep(call, next(call))
        if (known := kept.record.answer(call, [1])) is not None:
            return known
        kept.asked.append(call.step.call)
        return next(call)

    def step(self, call, next):
        out = next(call)
        call.shared.latents.append(out.sample.clone())
        return out


OTHERS = (EulerAncestralDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)


@pytest.mark.parametrize(
    ("family", "scheduler"), [(SD, None), ("WanPipeline", None), ("FluxPipeline", None), *((SD, scheduler) for scheduler in OTHERS)]
)
def test_a_chosen_sample_goes_on_bit_for_bit(family, scheduler):
    pipe, kwargs = tiny(family)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    two = {**kwargs, "prompt": ["a dog", "a cat"], "num_inference_steps": 6, "output_type": "latent"}
    two["negative_prompt"] = ["", ""] if "negative_prompt" in kwargs else None
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    both = {name: value for name, value in two.items() if value is not None}
    plain = pipe(**both, generator=seeds)[0]

    class Here(Chooses):
        seen: ClassVar[list] = []

        def run(self, call, next):
            if "negative_prompt" in both:
                next_ = next
                next = lambda given: next_(given.replace(negative_prompt="") if not call.shared.first else given)  # noqa: E731
            return super().run(call, next)

    load_pipeline(pipe, plugins=[Here])
    found = pipe(**both, generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)])[0]
    [kept] = Here.seen
    assert sorted(set(kept.asked)) == [3, 4, 5]
    beginning, after = kept.latents[:3], kept.latents[3:]
    for batch, alone in zip(beginning[:2], after[:2], strict=True):  # a multistep solver makes the last step of a schedule in another way
        assert torch.equal(batch[1:2], alone)
    assert (found[0] - plain[1]).abs().max() < 2e-5 * plain[1].abs().max()


def asked(call, branches=("uncond", "cond"), branch="both", latents=None):
    """A denoiser call, as a record reads it."""
    latents = torch.ones(6, 3) if latents is None else latents
    return SimpleNamespace(step=SimpleNamespace(call=call), branches=branches, branch=branch, model_name="unet", latents=latents)


def test_a_record_numbers_the_samples_of_all_its_passes():
    record, passes = Record(2), [torch.randn(2 * n, 3) for n in (2, 1, 3)]
    for prediction in passes:
        record.another_pass()
        assert record.keep(asked(0, latents=prediction[: len(prediction) // 2]), prediction) is prediction
        record.keep(asked(1), 10 * prediction)
        record.keep(asked(2), prediction)  # behind the beginning
    uncond, cond = (torch.cat([p.chunk(2)[i] for p in passes]) for i in (0, 1))
    assert torch.equal(record.answer(asked(0, latents=uncond[[4, 0]]), [4, 0]), torch.cat([uncond[[4, 0]], cond[[4, 0]]]))
    assert torch.equal(record.answer(asked(1), [2]), 10 * torch.stack([uncond[2], cond[2]]))
    assert record.answer(asked(2), [0]) is None
    assert record.answer(asked(0, branch="cond"), [0]) is None
    record.choose([5, 2])
    record.ensure_begun_alike("me")
    assert torch.equal(record.answer(asked(0, latents=uncond[[5, 2]]), [0, 1]), torch.cat([uncond[[5, 2]], cond[[5, 2]]]))
    assert torch.equal(record.answer(asked(1), [1]), 10 * torch.stack([uncond[2], cond[2]]))
    record.ensure_begun_alike("me")
    record.answer(asked(0, latents=uncond[[2, 5]]), [0, 1])
    with pytest.raises(Conflict, match=r"me: .* began at other noise than the recorded one"):
        record.ensure_begun_alike("me")


def test_a_record_holds_nothing_of_samples_that_were_not_chosen():
    record, prediction = Record(1), torch.randn(8, 3)
    record.keep(asked(0, latents=prediction[:4]), prediction)
    watched = weakref.ref(prediction.untyped_storage())
    del prediction
    assert watched() is not None
    record.choose([2])
    gc.collect()
    assert watched() is None


def test_a_beginning_is_as_long_as_its_solver_needs():
    schedule = Schedule(torch.arange(9, -1, -1), torch.arange(10, -1, -1))
    for config, more in (({}, 0), ({"solver_order": 2}, 0), ({"solver_order": 3}, 1), ({"predictor_order": 2, "corrector_order": 4}, 2)):
        call = SimpleNamespace(scheduler=SimpleNamespace(config=config))
        short = beginning(call, schedule, 4)
        assert len(short.timesteps) == 4 + more
        assert len(short.sigmas) == 5 + more
    assert len(beginning(call, schedule, 10).timesteps) == 10
    assert beginning(call, Schedule(schedule.timesteps, None), 4).sigmas is None
