"""Each hook point, proved by probes on a U-Net with batched CFG, a DiT with batched CFG and DiTs with sequential CFG."""

from __future__ import annotations

import functools
import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from diffgraft import StepOutput, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.kernel.onion import step_result
from diffusers import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
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
        step = None if point in ("run", "schedule") else (call.step.call, call.step.calls)
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
    from diffgraft.kernel.given import describe

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


class Layers(Probe):
    """Halves what the feed-forwards give, and notes where it is."""

    name = "layers"
    seen: ClassVar[list] = []

    def select_blocks(self, blocks):
        return [info for info in blocks if info.is_layer]

    def block(self, call, next):
        self.seen.append((call.info.path, call.info.kind, call.info.layer))
        return next(call) * (0.5 if call.info.kind == "block.ffn" else 1.0)


def test_a_single_module_in_a_block_is_a_layer(monkeypatch):
    pipe, kwargs = tiny("WanPipeline")
    kwargs |= {"num_inference_steps": 1, "guidance_scale": 1.0}
    family = registry.find_family(type(pipe))
    inner = replace(family.blocks[0], layers=("attn1", "ffn", "norm1", "nothing"))
    monkeypatch.setattr("diffgraft.kernel.modular.find_family", lambda _: replace(family, blocks=(inner,)))
    plain, before = generate(pipe, kwargs), trace(pipe)
    load_pipeline(pipe, plugins=[Layers])
    assert not torch.equal(generate(pipe, kwargs), plain)
    names = ("attn1", "ffn", "norm1")
    assert sorted(Layers.seen) == [(f"blocks.{i}.{name}", f"block.{name}", 0) for i in range(3) for name in names]
    unload(pipe)
    assert trace(pipe) == before
    assert torch.equal(generate(pipe, kwargs), plain)


class Fewer(Everything):
    """Gives itself fewer points by a knob."""

    name = "fewer"

    class Config(PluginConfig):
        inside: bool = False

    def __init__(self, **knobs):
        super().__init__(**knobs)
        if not self.config.inside:
            self.points = functools.partial(tuple, ("run", "denoise"))


def test_a_plugin_may_give_itself_fewer_points():
    """Others of its points open no slot, promise nothing, and are there again with another knob."""
    pipe, kwargs = tiny("FluxPipeline")
    pipe = load_pipeline(pipe, plugins=[Fewer()])
    generate(pipe, kwargs)
    assert set(pipe.plugins.report().plugins["fewer"].fired) == {"run", "denoise"}
    pipe.plugins.configure("fewer", inside=True)
    generate(pipe, kwargs)
    assert {"block", "attention", "step"} <= set(pipe.plugins.report().plugins["fewer"].fired)
    assert {"block", "attention"} <= set(Fewer.points())


X = torch.zeros(1, 4, 8, 8)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (DDIMSchedulerOutput(prev_sample=X, pred_original_sample=X), "pred_original_sample"),
        (LCMSchedulerOutput(prev_sample=X, denoised=X), "denoised"),
        ((X, X), 1),
        ((X,), None),
        (FlowMatchEulerDiscreteSchedulerOutput(prev_sample=X), None),
    ],
    ids=["ddim", "lcm", "two", "one", "flow"],
)
def test_the_clean_sample_of_a_step_reaches_the_pipeline(raw, clean):
    """Latent consistency pipelines decode it."""
    given = StepOutput(X + 1, X + 2)
    call = SimpleNamespace(inner=lambda: raw, get=lambda name, default: not isinstance(raw, tuple))

    def chain(call):
        call.inner()
        return given

    result = step_result(chain, call)
    assert type(result) is type(raw)
    assert len(result) == len(raw)
    assert result[0] is given.sample
    assert clean is None or result[clean] is given.x0
    given = StepOutput(X, X + 2)
    assert clean is None or step_result(chain, call)[clean] is given.x0, "also where it is all that a plugin changed"
    given = StepOutput(X + 1)
    assert clean is None or step_result(chain, call)[clean] is X, "a plugin that says none leaves the scheduler's"
