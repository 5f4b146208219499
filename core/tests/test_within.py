"""What else happens within a run: further denoiser calls, stops, other pipelines on the same denoiser."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from diffgraft import Unsupported, load_pipeline
from diffgraft.methods.conditioning import sibling
from diffusers.callbacks import PipelineCallback
from probes import Probe, generate, tiny

FURTHER = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}


class Branches(Probe):
    """Writes down each denoiser call, and what guidance gets."""

    name = "branches"
    seen: ClassVar[list] = []
    guided: ClassVar[list] = []

    def denoise(self, call, next):
        out = next(call)
        self.seen.append((call.branch, call.branches, call.texts, call.extra, call.guided, out.shape[0]))
        call.state.calls = getattr(call.state, "calls", 0) + 1
        call.count("calls")
        return out

    def guide(self, call, next):
        self.guided.append(sorted(call.branches))
        return next(call)


def test_a_further_call_of_a_step_has_its_own_name():
    pipe, kwargs = tiny("StableDiffusion3Pipeline")
    kwargs = {**kwargs, "num_inference_steps": 3, "output_type": "latent", **FURTHER}
    plain = generate(pipe, kwargs)
    Branches.seen.clear()
    Branches.guided.clear()
    load_pipeline(pipe, plugins=[Branches])
    assert torch.equal(generate(pipe, kwargs), plain)
    both, skip = Branches.seen[1:3]  # diffusers makes it from the second step on
    assert both == ("both", ("uncond", "cond"), ("uncond", "cond"), False, True, 2)
    assert skip == ("skip", ("skip",), ("cond",), True, True, 1)
    assert Branches.seen == [both, both, skip, both, skip]
    assert Branches.guided == [["cond", "uncond"], *[["cond", "skip", "uncond"]] * 2]
    assert pipe.plugins.report().plugins["branches"].counts["calls"] == {"both": 3, "skip": 2}


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_a_call_that_the_family_does_not_know_is_refused(name):
    """Another pipeline on the same denoiser, called where no callback says that it is outside."""
    pipe, kwargs = tiny(name)
    other = sibling(pipe)
    model = getattr(pipe, "unet", None) or pipe.transformer
    asked: list[int] = []

    def hook(*_):
        if not asked:
            asked.append(1)
            generate(other, kwargs)

    load_pipeline(pipe, plugins=[Branches])
    generate(pipe, kwargs)
    handle = model.register_forward_pre_hook(hook)
    try:
        with pytest.raises(Unsupported, match=r"denoiser call [23] of a step"):
            generate(pipe, kwargs)
    finally:
        handle.remove()


class Cutting(PipelineCallback):
    """One of diffusers' callback objects; it runs another pipeline."""

    tensor_inputs = ["latents"]  # noqa: RUF012
    other, kwargs, pictures = None, None, None

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        if step_index == 1:
            self.pictures.append(generate(self.other, self.kwargs, seed=3))
        return callback_kwargs


@pytest.mark.parametrize("form", ["function", "object", "denoiser"])
def test_what_a_callback_runs_on_the_denoiser_is_no_part_of_the_run(form):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    kwargs = {**kwargs, "num_inference_steps": 4, "output_type": "latent"}
    other = sibling(pipe)
    plain = generate(other, kwargs, seed=3)
    load_pipeline(pipe, plugins=[Branches])
    alone = generate(pipe, kwargs)
    pictures: list[torch.Tensor] = []
    callback = Cutting()
    callback.other, callback.kwargs, callback.pictures = other, kwargs, pictures

    def function(p, i, t, tensors):
        if form == "denoiser":
            p.unet(tensors["latents"], t, encoder_hidden_states=torch.zeros(1, 1, p.unet.config.cross_attention_dim))
        else:
            callback.callback_fn(p, i, t, tensors)
        return tensors

    Branches.seen.clear()
    assert torch.equal(generate(pipe, kwargs, callback_on_step_end=callback if form == "object" else function), alone)
    assert len(Branches.seen) == 4
    assert all(torch.equal(picture, plain) for picture in pictures)
    assert len(pictures) == (form != "denoiser")


class Twice(Probe):
    """Runs the pipeline three times; says what it knows of the user's stop."""

    name = "twice"
    told: ClassVar[list] = []

    def run(self, call, next):
        self.told.clear()
        for _ in range(3):
            result = next(call)
            self.told.append(call.stopped)
        return result


def stop_at(number, seen):
    def callback(pipe, i, t, tensors):
        seen.append(i)
        if len(seen) == number:
            pipe._interrupt = True
        return tensors

    return callback


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "WanPipeline"])
@pytest.mark.parametrize(("number", "told"), [(1, [True] * 3), (6, [False, True, True]), (99, [False] * 3)])
def test_a_stop_ends_all_passes(name, number, told):
    pipe, kwargs = tiny(name)
    load_pipeline(pipe, plugins=[Twice, Branches])
    seen: list[int] = []
    out = generate(pipe, {**kwargs, "num_inference_steps": 4, "output_type": "latent"}, callback_on_step_end=stop_at(number, seen))
    assert torch.isfinite(out).all()
    assert len(seen) == min(number, 12)
    assert Twice.told == told
    seen.clear()
    generate(pipe, {**kwargs, "num_inference_steps": 4}, callback_on_step_end=stop_at(99, seen))
    assert len(seen) == 12  # the next call knows nothing of it


class Within(Probe):
    """Runs a second pipeline, with a plugin of its own, at its first denoiser call."""

    name = "within"
    second: ClassVar[list] = []

    class State:
        begun = False

    def denoise(self, call, next):
        if call.step.index == 1 and not call.shared.begun:
            call.shared.begun = True
            call.pipe._interrupt = True  # as another thread does it
            generate(self.second[0], self.second[1])
        return next(call)


def test_a_stop_ends_a_run_that_a_plugin_began():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    second, _ = tiny("StableDiffusionPipeline")
    load_pipeline(second, plugins=[Branches])
    Within.second[:] = [second, {**kwargs, "num_inference_steps": 7}]
    load_pipeline(pipe, plugins=[Within])
    Branches.seen.clear()
    generate(pipe, {**kwargs, "num_inference_steps": 5})
    assert len(Branches.seen) == 1
    assert pipe.plugins.report().steps == 2


def test_a_call_that_is_stopped_before_its_first_step_breaks_no_promise():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Branches])
    inner = pipe.scheduler.set_timesteps

    def stopping(*args, **more):
        pipe._interrupt = True
        return inner(*args, **more)

    pipe.scheduler.set_timesteps = stopping
    generate(pipe, kwargs)
    assert pipe.plugins.report().completed
