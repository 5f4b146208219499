"""Schedules, schedulers and the count of steps: edited, replaced, cut, repeated; and runs that call the pipeline several times."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import ClassVar

import pytest
import torch
from diffgraft import Schedule, StepOutput, Unsupported, load_pipeline, unload
from diffgraft.methods.starts import follows
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from probes import Effects, PluginConfig, Probe, generate, tiny, trace
from test_points import Log


class Halve(Probe):
    """Hands the schedule on with every second step left out."""

    name = "halve"

    def schedule(self, call, next):
        made = next(call)
        sigmas = None if made.sigmas is None else torch.cat([made.sigmas[:-1][::2], made.sigmas[-1:]])
        return Schedule(made.timesteps[::2], sigmas)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline"])
def test_an_edited_schedule_is_run(name):
    pipe, kwargs = tiny(name)
    flow = name == "WanPipeline"
    pipe.scheduler = (FlowMatchEulerDiscreteScheduler if flow else EulerDiscreteScheduler).from_config(pipe.scheduler.config)
    load_pipeline(pipe, plugins=[Halve])
    generate(pipe, kwargs, num_inference_steps=4)
    assert pipe.plugins.report().steps == 2


def test_a_scheduler_that_cannot_follow_an_edited_schedule_is_refused():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    before = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Halve])
    with pytest.raises(Unsupported, match="PNDMScheduler cannot follow"):
        generate(pipe, kwargs)
    pipe.plugins.remove("halve")
    assert torch.equal(generate(pipe, kwargs), before)


def test_a_step_knows_how_much_of_the_schedule_was_left_out_before_it():
    class Places(Probe):
        seen: ClassVar[list[tuple[int, int, int]]] = []

        def denoise(self, call, next):
            self.seen.append((call.step.begin, call.step.index, call.step.total))
            return next(call)

    pipe, kwargs = tiny("StableDiffusionImg2ImgPipeline")
    load_pipeline(pipe, plugins=[Places])
    generate(pipe, kwargs, num_inference_steps=4, strength=0.5)
    assert Places.seen == [(2, 0, 2), (2, 1, 2)]


class Given(Probe):
    """Puts these timesteps into the scheduler."""

    name = "given"
    timesteps: ClassVar[list[float]] = []

    def schedule(self, call, next):
        made = next(call)
        return Schedule(torch.tensor(self.timesteps), made.sigmas)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiTPipeline"])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_follows_an_edited_schedule(name, eta, monkeypatch):
    """Timesteps of one spacing given to the scheduler of another: the same bits as the scheduler of that spacing."""
    pipe, kwargs = tiny(name)
    if eta and "eta" not in inspect.signature(type(pipe).__call__).parameters:
        return
    more = {"num_inference_steps": 4} | ({"eta": eta} if eta else {})
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    wanted = generate(pipe, kwargs, **more)
    monkeypatch.setattr(Given, "timesteps", pipe.scheduler.timesteps.tolist())
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert not torch.equal(generate(pipe, kwargs, **more), wanted)
    load_pipeline(pipe, plugins=[Given])
    assert torch.equal(generate(pipe, kwargs, **more), wanted)
    assert pipe.scheduler.num_inference_steps == 4


def test_ddim_goes_exactly_as_far_as_an_edited_schedule_says(monkeypatch):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    visited, scheduler = [], pipe.scheduler
    variance = scheduler._get_variance
    monkeypatch.setattr(scheduler, "_get_variance", lambda t, before: visited.append((int(t), int(before))) or variance(t, before))
    monkeypatch.setattr(Given, "timesteps", [977, 611, 610, 7])
    load_pipeline(pipe, plugins=[Given])
    generate(pipe, kwargs, num_inference_steps=4)
    assert visited == [(977, 611), (611, 610), (610, 7), (7, -993)]
    for bad in ([977, 611, 611, 7], [7, 611], [611.5, 7.0], [1000, 3]):
        monkeypatch.setattr(Given, "timesteps", bad)
        with pytest.raises(Unsupported, match="DDIMScheduler moves between falling whole timesteps of 0 to 999"):
            generate(pipe, kwargs, num_inference_steps=4)


class MySteps(EulerDiscreteScheduler):
    """A scheduler that a plugin brings along."""


class Replace(Probe):
    name = "replace"
    scheduler = MySteps
    effects = Effects(replaces=frozenset({"scheduler"}))

    def make_scheduler(self, old, family):
        return MySteps.from_config(old.config, timestep_spacing="trailing")


def test_a_scheduler_is_replaced_for_the_run_only():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    own, config = pipe.scheduler, dict(pipe.config)
    load_pipeline(pipe, plugins=[Replace])
    replaced = generate(pipe, kwargs)
    assert pipe.scheduler is own
    assert dict(pipe.config) == config
    unload(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config, timestep_spacing="trailing")
    torch.testing.assert_close(generate(pipe, kwargs), replaced, rtol=0, atol=1e-4)  # DDIM's unit was Euler's by a factor, there and back


def test_a_scheduler_made_for_a_run_is_freed_with_it():
    made = []

    class Remember(Replace):
        name = "remember"

        def make_scheduler(self, old, family):
            scheduler = super().make_scheduler(old, family)
            made.append(weakref.ref(scheduler))
            return scheduler

    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Remember])
    generate(pipe, kwargs)
    generate(pipe, kwargs)
    gc.collect()
    assert [ref() for ref in made] == [None, None]


def test_step_can_be_answered_without_the_scheduler():
    class Own(Probe):
        name = "own_step"

        def step(self, call, next):
            return StepOutput(call.sample - 0.1 * call.model_output)

    for name in ("StableDiffusionPipeline", "DDPMPipeline"):  # return_dict=False and .prev_sample
        pipe, kwargs = tiny(name)
        load_pipeline(pipe, plugins=[Own])
        assert generate(pipe, kwargs).isfinite().all()


class Twice(Probe):
    """Runs the pipeline twice and keeps the second result; remembers across its passes."""

    name = "twice"

    class State:
        passes = 0

    def run(self, call, next):
        for _ in range(2):
            call.shared.passes += 1
            result = next(call.replace(generator=torch.Generator().manual_seed(call.shared.passes)))
        call.count("passes", call.shared.passes)
        return result


class CountSteps(Probe):
    name = "count_steps"

    class State:
        seen = 0

    def denoise(self, call, next):
        assert call.shared.seen == call.step.index
        call.shared.seen += 1
        return next(call)


@pytest.mark.parametrize("offload", [False, True])
def test_run_may_call_the_pipeline_several_times(offload):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    expected = generate(pipe, kwargs, seed=2)
    if offload:
        pipe.enable_model_cpu_offload(device="cpu")
    load_pipeline(pipe, plugins=[Twice, CountSteps])
    assert torch.equal(generate(pipe, kwargs), expected)
    report = pipe.plugins.report()
    assert report.plugins["twice"].total("passes") == 2
    assert report.plugins["count_steps"].fired["denoise"] == 2 * kwargs["num_inference_steps"]


class SwapLinear(Probe):
    """Exchanges one module for one that answers zero."""

    name = "swap"

    def modules(self, call, next):
        for denoiser in call.denoisers.values():
            call.swap(denoiser, "conv_out", torch.nn.Sequential(denoiser.conv_out, torch.nn.Tanh()))
        return next(call)


def test_modules_are_exchanged_and_put_back():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    before, seen, conv = generate(pipe, kwargs), trace(pipe), pipe.unet.conv_out
    load_pipeline(pipe, plugins=[SwapLinear])
    assert not torch.equal(generate(pipe, kwargs), before)
    with pipe.plugins.disabled():
        assert pipe.unet.conv_out is conv
        assert torch.equal(generate(pipe, kwargs), before)
    assert pipe.unet.conv_out is not conv
    unload(pipe)
    assert pipe.unet.conv_out is conv
    assert trace(pipe) == seen


def test_calls_of_a_second_order_scheduler_are_counted_one_by_one():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    Log.calls.clear()
    load_pipeline(pipe, plugins=[Log])
    generate(pipe, kwargs, num_inference_steps=3)
    assert [c[1] for c in Log.calls if c[0] == "denoise"] == [(i, 5) for i in range(5)]


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
@pytest.mark.parametrize(("strength", "steps"), [(0.9, 9), (0.6, 6)])
def test_image_to_image_runs_the_tail_of_the_schedule(scheduler, strength, steps):
    seen = []

    class Where(Probe):
        name = "where"

        def denoise(self, call, next):
            seen.append((call.step.index, call.step.total, float(call.step.t), float(call.timestep.flatten()[0])))
            return next(call)

    pipe, kwargs = tiny("StableDiffusionImg2ImgPipeline")
    if scheduler == "euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    load_pipeline(pipe, plugins=[Where])
    generate(pipe, kwargs, num_inference_steps=10, strength=strength)
    assert [(i, n) for i, n, *_ in seen] == [(i, steps) for i in range(steps)]
    assert all(t == passed for *_, t, passed in seen)


def test_two_transformers_of_wan_share_the_step_count():
    pipe, kwargs = tiny("WanPipeline@2.2")
    Log.calls.clear()
    load_pipeline(pipe, plugins=[Log])
    generate(pipe, kwargs)
    seen = [(c[3], c[1][0], c[2]) for c in Log.calls if c[0] == "denoise"]
    assert {model for model, *_ in seen} == {"transformer", "transformer_2"}
    assert [index for _, index, _ in seen] == [i for i in range(4) for _ in range(2)]
    assert [branch for *_, branch in seen] == ["cond", "uncond"] * 4


class Controlled(Probe):
    """Runs the ControlNet at the first step only and hands its residuals out again."""

    name = "controlled"

    class State:
        residuals = None

    def control(self, call, next):
        call.count("asked")
        if call.step.index == 0:
            call.shared.residuals = next(call)
        return call.shared.residuals


def test_a_controlnet_can_be_left_out():
    pipe, kwargs = tiny("StableDiffusionControlNetPipeline")
    baseline = generate(pipe, kwargs)
    calls = []
    pipe.controlnet.conv_in.register_forward_pre_hook(lambda *_: calls.append(1))
    load_pipeline(pipe, plugins=[type("Plain", (Probe,), {"control": lambda self, call, next: next(call)})])
    assert torch.equal(generate(pipe, kwargs), baseline)
    steps = len(calls)
    assert steps > 1
    calls.clear()
    load_pipeline(unload(pipe), plugins=[Controlled])
    assert not torch.equal(generate(pipe, kwargs), baseline)
    assert len(calls) == 1
    assert pipe.plugins.report().plugins["controlled"].total("asked") == steps
    unload(pipe)
    assert "forward" not in pipe.controlnet.__dict__


def test_a_pipeline_without_controlnet_has_nothing_to_control():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Controlled])
    generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["controlled"].fired == {}


class Ahead(Probe):
    """Writes down what it is told of the steps to come, and of the present one."""

    name = "ahead"
    told: ClassVar[list] = []

    def step(self, call, next):
        self.told.append([(s.index, s.total, float(s.t)) for s in (call.step, *(call.step_at(k) for k in range(4)))])
        return next(call)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "FluxPipeline"])
def test_steps_to_come_are_known(name):
    pipe, kwargs = tiny(name)
    Ahead.told.clear()
    load_pipeline(pipe, plugins=[Ahead])
    generate(pipe, kwargs, num_inference_steps=4)
    present = [row[0] for row in Ahead.told]
    last = len(present) - 1
    for i, row in enumerate(Ahead.told):
        assert row[1:] == [present[min(i + k, last)] for k in range(4)]


class Part(Probe):
    """Runs the schedule's steps from ``begin`` to ``end``."""

    name = "part"

    class Config(PluginConfig):
        begin: int = 0
        end: int = 100

    def schedule(self, call, next):
        timesteps, sigmas = next(call)
        begin, end = self.config.begin, min(self.config.end, len(timesteps))
        return Schedule(timesteps[begin:end], None if sigmas is None else sigmas[begin : end + 1])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_schedule_in_two_parts_is_the_whole(scheduler):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    kwargs = {**kwargs, "num_inference_steps": 6, "output_type": "latent"}
    whole = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Part(end=3)])
    first = generate(pipe, kwargs)
    assert pipe.plugins.report().steps == 3
    pipe.plugins.configure("part", begin=3, end=6)
    pipe.scheduler.set_timesteps(6)
    if scheduler is EulerDiscreteScheduler:
        pipe.scheduler.sigmas = pipe.scheduler.sigmas[3:]
    start = first / pipe.scheduler.init_noise_sigma  # what the pipeline will multiply given latents with
    assert torch.allclose(generate(pipe, {**kwargs, "latents": start}), whole, atol=1e-4)


def test_who_follows_an_edited_schedule_is_known_before_a_run():
    known = {scheduler: follows(scheduler()) for scheduler in (PNDMScheduler, DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler)}
    assert known == {PNDMScheduler: False, DDIMScheduler: True, DDPMScheduler: True, EulerDiscreteScheduler: True}
