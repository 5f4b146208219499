"""Each hook point, proved by probes on a U-Net with batched CFG, a DiT with batched CFG and DiTs with sequential CFG."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from typing import ClassVar

import pytest
import torch
from diffgraft import Schedule, StepOutput, Unsupported, load_pipeline, unload
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from probes import Effects, Everything, PluginConfig, Probe, generate, tiny, trace

BATCHED = ("StableDiffusionPipeline", "PixArtAlphaPipeline")
SEQUENTIAL = ("FluxPipeline", "WanPipeline")
ALL = BATCHED + SEQUENTIAL
APPENDING = ("WanImageToVideoPipeline", "CogVideoXImageToVideoPipeline", "FluxFillPipeline", "StableVideoDiffusionPipeline")


class Log(Everything):
    """Writes down every call in the order in which they happen."""

    name = "log"
    calls: ClassVar[list] = []

    def _log(self, point, call, next, where=""):
        step = None if point in ("run", "schedule") else (call.step.index, call.step.total)
        self.calls.append((point, step, call.branch, where))
        return next(call)

    def run(self, call, next):
        return self._log("run", call, next)

    def schedule(self, call, next):
        return self._log("schedule", call, next)

    def denoise(self, call, next):
        return self._log("denoise", call, next, call.model_name)

    def block(self, call, next):
        return self._log("block", call, next, call.info.path)

    def attention(self, call, next):
        return self._log("attention", call, next, call.info.path)

    def guide(self, call, next):
        return self._log("guide", call, next)

    def step(self, call, next):
        return self._log("step", call, next)


@pytest.mark.parametrize("name", ALL)
def test_count_order_step_and_branch(name):
    pipe, kwargs = tiny(name)
    kwargs["num_inference_steps"] = 3
    Log.calls.clear()
    load_pipeline(pipe, plugins=[Log])
    generate(pipe, kwargs)
    points = [call[0] for call in Log.calls]
    branches = ["both"] if name in BATCHED else ["cond", "uncond"]
    assert points[:2] == ["run", "schedule"]
    assert [c[1:3] for c in Log.calls if c[0] == "denoise"] == [((i, 3), b) for i in range(3) for b in branches]
    assert [c[1] for c in Log.calls if c[0] == "guide"] == [(i, 3) for i in range(3)]
    assert [c[1] for c in Log.calls if c[0] == "step"] == [(i, 3) for i in range(3)]
    # inside one denoiser call: attention layers inside their blocks, blocks in the family's running order, all of the call's branch
    first = Log.calls.index(next(c for c in Log.calls if c[0] == "denoise"))
    last = next(i for i in range(first + 1, len(Log.calls)) if Log.calls[i][0] not in ("block", "attention"))
    inside = Log.calls[first + 1 : last]
    assert {c[2] for c in inside} == {branches[0]}
    assert {c[1] for c in inside} == {(0, 3)}
    blocks = [c[3] for c in inside if c[0] == "block"]
    top = [path for path in blocks if path.count(".") <= 1]
    from diffgraft.kernel.stack import describe

    expected = [b.path for b in describe(pipe, pipe.plugins.family).blocks if not b.is_layer]
    assert top == expected
    for path in (c[3] for c in inside if c[0] == "attention"):
        assert any(path.startswith(block) for block in top)
    # the last thing of a step is the guide, then the step
    assert points[-2:] == ["guide", "step"]


@pytest.mark.parametrize("name", ALL)
def test_do_nothing_everywhere_is_bit_equal_and_leaves_no_trace(name):
    pipe, kwargs = tiny(name)
    before_trace = trace(pipe)
    before = generate(pipe, kwargs)
    pristine = trace(pipe)
    load_pipeline(pipe, plugins=[Everything])
    assert torch.equal(generate(pipe, kwargs), before)
    between = trace(pipe)
    assert {k: v for k, v in between.items() if k != "class"} == {k: v for k, v in pristine.items() if k != "class"}
    unload(pipe)
    assert trace(pipe) == pristine
    assert before_trace["class"] is pristine["class"]
    assert torch.equal(generate(pipe, kwargs), before)


@pytest.mark.parametrize("name", ALL)
def test_first_in_the_list_is_outermost_at_every_point(name):
    order = []

    def probe(label):
        def around(point):
            def method(self, call, next):
                order.append((point, label, "in"))
                result = next(call)
                order.append((point, label, "out"))
                return result

            return method

        points = ("run", "schedule", "denoise", "block", "attention", "guide", "step")
        return type(label, (Probe,), {"name": label, **{point: around(point) for point in points}})

    pipe, kwargs = tiny(name)
    load_pipeline(pipe, plugins=[probe("a"), probe("b")])
    generate(pipe, kwargs, num_inference_steps=2)
    for point in ("run", "schedule", "denoise", "block", "attention", "guide", "step"):
        seen = [(label, side) for p, label, side in order if p == point][:2]
        assert seen == [("a", "in"), ("b", "in")], point
        ends = [(label, side) for p, label, side in order if p == point][-2:]
        assert ends == [("b", "out"), ("a", "out")], point


class ScaleConfig(PluginConfig):
    by: float = 2.0


class ScalePrediction(Probe):
    """Doubles every branch's prediction: the guided result must be exactly twice the pipeline's own."""

    name = "scale_prediction"
    Config = ScaleConfig

    def denoise(self, call, next):
        return next(call) * self.config.by


class ScaleGuided(Probe):
    name = "scale_guided"
    Config = ScaleConfig

    def guide(self, call, next):
        return next(call) * self.config.by


class ScaleStepInput(Probe):
    name = "scale_step_input"
    Config = ScaleConfig

    def step(self, call, next):
        return next(call.replace(model_output=call.model_output * self.config.by))


@pytest.mark.parametrize("name", ALL)
def test_three_ways_to_scale_the_prediction_agree_exactly(name):
    """Guidance is linear and 2 is a power of two, so all three are the same numbers bit for bit."""
    results = []
    for plugin in (ScalePrediction, ScaleGuided, ScaleStepInput):
        pipe, kwargs = tiny(name)
        load_pipeline(pipe, plugins=[plugin])
        results.append(generate(pipe, kwargs))
    plain, kwargs = tiny(name)
    assert not torch.equal(results[0], generate(plain, kwargs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[1], results[2])


class OwnGuidance(Probe):
    """Classifier-free guidance written out again from the branches."""

    name = "own_guidance"

    def guide(self, call, next):
        assert set(call.branches) == {"cond", "uncond"}
        return call.uncond + call.scale * (call.cond - call.uncond)


@pytest.mark.parametrize(
    "name", [*ALL, "DiTPipeline", "StableDiffusion3Pipeline", "FluxKontextPipeline", "LTXPipeline", "CogVideoXPipeline"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_guidance_from_the_branches_equals_the_pipelines_own(name, dtype):
    pipe, kwargs = tiny(name)
    pipe.to(dtype)
    before = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[OwnGuidance])
    guided = generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["own_guidance"].fired["guide"] == kwargs["num_inference_steps"]
    assert torch.equal(guided, before)


def test_guide_sees_nothing_when_guidance_is_off():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    before = generate(pipe, kwargs, guidance_scale=1.0)
    load_pipeline(pipe, plugins=[OwnGuidance])
    assert torch.equal(generate(pipe, kwargs, guidance_scale=1.0), before)
    report = pipe.plugins.report()
    assert report.denoiser_calls == {"cond": 4}
    assert "inactive: guidance was off" in report.plugins["own_guidance"].notes[0]


def test_guidance_rescale_is_in_the_pipelines_own_combination():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    before = generate(pipe, kwargs, guidance_rescale=0.7)
    load_pipeline(pipe, plugins=[Everything])
    assert torch.equal(generate(pipe, kwargs, guidance_rescale=0.7), before)


class SkipBlocks(Probe):
    """Leaves out every block but the first by handing its input on."""

    name = "skip_blocks"
    effects = Effects(skips=frozenset({"blocks"}))

    def block(self, call, next):
        if call.info.index == 0:
            return next(call)
        call.count("skipped")
        values = tuple(call[name] for name in call.info.returns)
        return values[0] if len(values) == 1 else values


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "FluxPipeline", "WanPipeline"])
def test_a_block_can_be_left_out_by_the_familys_facts(name):
    pipe, kwargs = tiny(name)
    ran = []
    handles = [
        module.register_forward_hook(lambda m, a, o, p=path: ran.append(p))
        for path, module in pipe.transformer.named_modules()
        if path.endswith(("blocks.1", "blocks.0"))
    ]
    load_pipeline(pipe, plugins=[SkipBlocks])
    generate(pipe, kwargs)
    assert pipe.plugins.report().plugins["skip_blocks"].total("skipped") > 0
    for handle in handles:
        handle.remove()


class EditLatents(Probe):
    """Adds to the latents before the denoiser sees them, at step 2 only."""

    name = "edit_latents"
    effects = Effects(edits=frozenset({"latents"}))

    def denoise(self, call, next):
        if call.step.index == 2:
            if call.branch != "uncond":
                call.shared.edited = call.latents + 0.25
            call = call.with_latents(call.shared.edited)
        return next(call)

    class State:
        edited = None


@pytest.mark.parametrize(
    ("name", "euler"),
    [(name, False) for name in (*ALL, "StableDiffusionInpaintPipeline", "DiTPipeline", *APPENDING)]
    + [(name, True) for name in (*BATCHED, "StableDiffusionInpaintPipeline")],  # a scheduler that scales the denoiser's input
)
def test_edited_latents_reach_the_denoiser_and_the_step(name, euler):
    """The same as editing the pipeline's own variable through its callback at the end of step 1."""
    pipe, kwargs = tiny(name)
    if euler:
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def edit(pipe, i, t, values):
            return {"latents": values["latents"] + 0.25} if i == 1 else {}

        expected = generate(pipe, kwargs, callback_on_step_end=edit)
    else:
        step = pipe.scheduler.step
        count = []

        def stepping(*args, **kw):
            out = step(*args, **kw)
            count.append(0)
            if len(count) == 2:
                if isinstance(out, tuple):
                    return (out[0] + 0.25, *out[1:])
                out.prev_sample = out.prev_sample + 0.25
            return out

        pipe.scheduler.step = functools.wraps(step)(stepping)
        expected = generate(pipe, kwargs)
        del pipe.scheduler.step
    load_pipeline(pipe, plugins=[EditLatents])
    edited = generate(pipe, kwargs)
    unload(pipe)
    assert not torch.equal(expected, generate(pipe, kwargs))
    assert torch.allclose(edited, expected, atol=1e-5)
    if not euler:
        assert torch.equal(edited, expected)


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
    assert torch.equal(generate(pipe, kwargs), replaced)


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


def test_steps_of_a_second_order_scheduler_are_counted_one_by_one():
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
