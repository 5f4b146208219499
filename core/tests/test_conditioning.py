"""The conditioning that a second pipeline makes of the same prompt."""

from __future__ import annotations

import pytest
import torch
from diffgraft import Unsupported, load_pipeline
from diffgraft.methods.conditioning import own_conditioning, same_text_encoders, sibling
from probes import Probe, generate, tiny, trace

NAMES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "WanPipeline", "PixArtAlphaPipeline")


class Ear(Probe):
    """Keeps the conditioning that the pipeline's own run hands over, by branch."""

    name = "ear"

    class State:
        def __init__(self):
            self.heard = {}

    def run(self, call, next):
        out = next(call)
        call.record(call.shared.heard)
        return out

    def denoise(self, call, next):
        for name in call.family.conditioning:
            value = call.get(name)
            if isinstance(value, torch.Tensor):
                for branch, part in zip(call.branches, value.chunk(len(call.branches)), strict=True):
                    call.shared.heard[f"{branch} {name}"] = part
        return next(call)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_pipeline_hands_to_its_own_denoiser(name):
    pipe, kwargs = tiny(name)
    load_pipeline(pipe, plugins=[Ear])
    generate(pipe, kwargs)
    expected = pipe.plugins.report().plugins["ear"].records
    assert expected
    second, _ = tiny(name)
    generate(second, kwargs)  # a first run leaves attributes of its own
    before = trace(second)
    made = own_conditioning(second, kwargs)
    assert trace(second) == before
    for key, value in expected.items():
        branch, argument = key.split(" ")
        assert torch.equal(made.of_branch[branch][argument], value), key


def test_text_encoders_are_told_apart():
    first, second = tiny("StableDiffusionPipeline")[0], tiny("StableDiffusionPipeline")[0]
    assert same_text_encoders(first, second)
    with torch.no_grad():
        for p in second.text_encoder.parameters():
            p.mul_(1.5)
    assert not same_text_encoders(first, second)


def test_embeddings_of_the_first_pipeline_are_refused():
    pipe, _ = tiny("StableDiffusionPipeline")
    with pytest.raises(Unsupported, match="prompt_embeds: embeddings of the first pipeline"):
        own_conditioning(pipe, {"prompt_embeds": torch.zeros(1, 4, 8)})


class Asks(Probe):
    """Asks the running pipeline itself what it makes of the prompt with guidance."""

    name = "asks"

    def run(self, call, next):
        made = own_conditioning(call.pipe, {**call.arguments(), "guidance_scale": 5.0})
        call.record({f"{branch} {name}": value for branch, part in made.of_branch.items() for name, value in part.items()})
        return next(call)


def test_a_running_pipeline_is_asked_for_another_guidance_scale():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    guided = own_conditioning(pipe, {**kwargs, "guidance_scale": 5.0})
    baseline = generate(pipe, {**kwargs, "guidance_scale": 1.0})
    load_pipeline(pipe, plugins=[Asks])
    assert torch.equal(generate(pipe, {**kwargs, "guidance_scale": 1.0}), baseline)
    records = pipe.plugins.report().plugins["asks"].records
    assert set(records) == {"cond encoder_hidden_states", "uncond encoder_hidden_states"}
    for branch, part in guided.of_branch.items():
        assert torch.equal(records[f"{branch} encoder_hidden_states"], part["encoder_hidden_states"])


@pytest.mark.parametrize("name", NAMES)
def test_a_sibling_shares_everything_but_the_scheduler(name):
    pipe, kwargs = tiny(name)
    twin = sibling(pipe)
    assert type(twin) is type(pipe)
    assert {k: v for k, v in twin.components.items() if k != "scheduler"} == {k: v for k, v in pipe.components.items() if k != "scheduler"}
    assert twin.scheduler is not pipe.scheduler
    assert twin.scheduler.config == pipe.scheduler.config
    assert torch.equal(generate(twin, kwargs), generate(pipe, kwargs))
