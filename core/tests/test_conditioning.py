"""The conditioning that a second pipeline makes of the same prompt."""

from __future__ import annotations

import pytest
import torch
from diffgraft import Unsupported, load_pipeline
from diffgraft.methods.conditioning import (
    PromptWatch,
    is_of_the_prompt,
    number_of_prompts,
    own_conditioning,
    same_text_encoders,
    sibling,
    told,
    with_prompt,
)
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


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_call_is_what_a_session_wants(name):
    pipe, kwargs = tiny(name)
    made = own_conditioning(pipe, kwargs)
    load_pipeline(pipe)
    denoiser = getattr(pipe, pipe.plugins.family.denoisers[0])
    for branch, asked in made.whole.items():
        assert set(made.of_branch[branch]) < set(asked)
        with torch.no_grad(), pipe.plugins.session() as session:
            found = session.model(**asked, branch=branch)[0]
        with torch.no_grad():
            assert torch.equal(denoiser(**asked)[0], found), branch


def test_tokenizers_keep_nothing_of_being_asked():
    """A guided run ends with padding to the longest of all; one without guidance would leave the prompt's own length."""
    pipe, kwargs = tiny("StableDiffusionPipeline")
    for state in ("of a run", "none"):
        if state == "of a run":
            generate(pipe, kwargs)
        else:
            pipe.tokenizer.backend_tokenizer.no_padding()
            pipe.tokenizer.backend_tokenizer.no_truncation()
        before = pipe.tokenizer.backend_tokenizer.to_str()
        own_conditioning(pipe, {**kwargs, "guidance_scale": 1.0, "prompt": "a green dog"})
        assert pipe.tokenizer.backend_tokenizer.to_str() == before, state


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


class Compares(Probe):
    """Asks for the conditioning of its run's own arguments, and holds it against what the run hands over."""

    name = "compares"

    def run(self, call, next):
        self.heard = own_conditioning(call.pipe, call.arguments()).of_branch["cond"]
        return next(call)

    def denoise(self, call, next):
        if "cond" in call.branches:
            given = told(call.only("cond"))
            assert self.heard.keys() == given.keys()
            assert all(torch.equal(self.heard[name], given[name]) for name in given)
        return next(call)


@pytest.mark.parametrize("said", [{}, {"complex_human_instruction": None}, {"complex_human_instruction": ["Be brief."]}])
def test_a_none_of_a_running_pipelines_call_is_said(said):
    """Sana puts an instruction before a prompt, and None takes it away."""
    pipe, kwargs = tiny("SanaPipeline")
    kwargs = {name: value for name, value in kwargs.items() if name != "complex_human_instruction"} | said
    generate(load_pipeline(pipe, plugins=[Compares]), {**kwargs, "max_sequence_length": 24})


@pytest.mark.parametrize("templates", [{}, {"prompt_template_encode": "in short: {}", "prompt_template_encode_start_idx": 1}])
def test_what_its_user_has_set_on_a_pipeline_its_sibling_has_too(templates):
    """Qwen-Image's template is a plain attribute."""
    pipe, kwargs = tiny("QwenImagePipeline")
    for name, value in templates.items():
        setattr(pipe, name, value)
    generate(load_pipeline(pipe, plugins=[Compares]), kwargs)


class Replaces(Probe):
    """Has a scheduler of few steps in the place of the pipeline's own, and asks in the middle of the run."""

    name = "replaces"

    def make_scheduler(self, old, family):
        class OfFewSteps(type(old)):
            def set_timesteps(self, num_inference_steps=None, **kwargs):
                assert num_inference_steps < 10, "no schedule of the run"
                super().set_timesteps(num_inference_steps, **kwargs)

        return OfFewSteps.from_config(old.config)

    def run(self, call, next):
        result = next(call)
        assert type(sibling(call.pipe).scheduler) is type(call.pipe.plugins.own_scheduler()) is not type(call.pipe.scheduler)
        assert type(sibling(call.pipe, call.pipe.scheduler).scheduler) is type(call.pipe.scheduler)
        arguments = {name: value for name, value in call.arguments().items() if name != "num_inference_steps"}
        assert own_conditioning(call.pipe, arguments).of_branch  # by the pipeline's usual number of steps
        return result


def test_a_sibling_made_in_a_run_has_the_pipelines_own_scheduler():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    own = pipe.scheduler
    load_pipeline(pipe, plugins=[Replaces])
    assert pipe.plugins.own_scheduler() is own
    generate(pipe, kwargs)
    assert pipe.plugins.own_scheduler() is own


def test_another_prompt_takes_the_place_of_every_form_of_the_first():
    said = {
        "prompt": None, "prompt_2": "a", "prompt_embeds": torch.zeros(3, 2), "pooled_prompt_embeds": 1, "negative_prompt": "b",
        "negative_prompt_embeds": 1, "negative_pooled_prompt_embeds": 1, "prompt_attention_mask": 1, "prompt_embeds_mask": 1,
        "negative_prompt_2": "b", "prompt_embeds_qwen": 1,
    }  # fmt: skip
    kept = {"num_images_per_prompt": 2, "prompt_template": "x", "height": 64, "clip_skip": 1}
    assert with_prompt({**said, **kept}, "c") == with_prompt({**said, **kept}, ["c"]) == {**kept, "prompt": "c"}
    assert with_prompt(said, ["c", "d"]) == {"prompt": ["c", "d"]}
    assert all(map(is_of_the_prompt, said))
    assert number_of_prompts(said) == 3
    assert number_of_prompts({"prompt": "a"}) == 1
    assert number_of_prompts({"prompt": ["a", "b"]}) == 2


class Watching(Probe):
    """Notes whether the prompt was changed in mid-run."""

    name = "watching"
    State = PromptWatch

    def run(self, call, next):
        out = next(call)
        if call.shared.changed:
            call.note("changed")
        return out

    def denoise(self, call, next):
        call.shared.see(call)
        return next(call)


def exchanged(tensors):
    return {name: value.flip(0) + 1 for name, value in tensors.items()}


def in_place(tensors):
    tensors["prompt_embeds"] += 1
    return tensors


def copied(tensors):
    return {name: value.clone() for name, value in tensors.items()}


def without_guidance(tensors):
    return {name: value.chunk(2)[-1] for name, value in tensors.items()}


@pytest.mark.parametrize(("change", "noted"), [(exchanged, True), (in_place, True), (copied, False), (without_guidance, False)])
def test_a_prompt_that_a_callback_changes_is_seen(change, noted):
    """By value: a copy is the same prompt, and a tensor that was written into is another one."""
    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Watching])

    def at_step(pipe, step, timestep, tensors):
        if step != 0:
            return {}
        if change is without_guidance:
            pipe._guidance_scale = 0.0
        return change(tensors)

    generate(pipe, {**kwargs, "callback_on_step_end": at_step, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]})
    assert (pipe.plugins.report().plugins["watching"].notes == ["changed"]) == noted
