"""Denoisers whose time runs the other way, whose output has the other sign, that take lists; guidance over "cond"; an optional branch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffgraft import Effects, StepOutput, Unsupported, load_pipeline, unload
from diffgraft.installed.registry import family_of
from diffgraft.methods.conditioning import Listening, ask, join
from diffgraft.methods.predictions import clean_estimate, known_kind, levels_of
from probes import Everything, Probe, generate, tiny, trace

ROUND = ("ZImagePipeline", "Lumina2Pipeline", "LuminaPipeline", "HiDreamImagePipeline", "Krea2Pipeline", "FluxPipeline")
every = pytest.mark.parametrize("name", ROUND)


@dataclass
class Kept:
    x: list[Any] = field(default_factory=list)


class Reads(Probe):
    """What a plugin reads in the denoiser and in the scheduler's step is one thing."""

    name = "reads"
    State = Kept

    def denoise(self, call, next):
        prediction = next(call)
        t = torch.as_tensor(call.timestep).float().flatten()[0]
        torch.testing.assert_close(t, call.family.told(call.step.t).float())
        assert isinstance(call.sample, torch.Tensor)
        assert prediction.shape[0] == call.sample.shape[0]
        if "cond" in call.branches:
            n, at = len(call.branches), call.branches.index("cond")
            output = prediction.chunk(n)[at]
            output = output[:, : call.latents.shape[1]] if output.ndim == 4 else output
            kind = known_kind(call.family, call.pipe.scheduler)
            call.shared.x.append((output, clean_estimate(call.latents, output, levels_of(call), kind)))
        return prediction

    def step(self, call, next):
        output, x0 = call.shared.x[-1]
        if not call.run.guidance_active():
            assert torch.equal(call.model_output, output)
        mine = clean_estimate(call.sample, output.to(call.sample.dtype), levels_of(call), "flow")
        torch.testing.assert_close(mine, x0.to(mine.dtype))
        after = call.step_at(1)
        sigma = after.sigma if after.call != call.step.call else call.scheduler.sigmas[-1]
        out = next(call)
        if not call.run.guidance_active():  # an Euler step is the line from here to the clean sample
            moved = x0 + sigma / call.step.sigma * (call.sample - x0)
            torch.testing.assert_close(out.sample, moved.to(out.sample.dtype), rtol=1e-4, atol=1e-4)
        return StepOutput(out.sample, out.x0)


class Formula(Probe):
    """Guidance's formula with the scale that plugins are told."""

    name = "formula"
    effects = Effects(edits=frozenset({"prediction"}))

    def guide(self, call, next):
        made = call.uncond + call.scale * (call.cond - call.uncond)
        torch.testing.assert_close(made, call.combined, rtol=1e-4, atol=1e-5)
        return next(call)


@every
@pytest.mark.parametrize("guided", [True, False])
def test_time_sign_and_levels_are_those_of_the_scheduler(name, guided):
    pipe, kwargs = tiny(name)
    plain, before = generate(pipe, kwargs), trace(pipe)
    scale = "true_cfg_scale" if name == "FluxPipeline" else "guidance_scale"
    kwargs = kwargs if guided else kwargs | {scale: 0.0 if name in ("ZImagePipeline", "Krea2Pipeline") else 1.0}
    load_pipeline(pipe, plugins=[Reads, Everything])
    image = generate(pipe, kwargs)
    assert torch.equal(image, plain) == guided
    unload(pipe)
    assert trace(pipe) == before


@pytest.mark.parametrize("name", ["ZImagePipeline", "Krea2Pipeline"])
def test_the_scale_is_that_of_the_formula(name):
    pipe, kwargs = tiny(name)
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Formula])
    assert torch.equal(generate(pipe, kwargs), plain)


class OneByOne(Probe):
    """Asks for each branch alone."""

    name = "one_by_one"

    def denoise(self, call, next):
        parts = [next(call.only(branch)) for branch in call.branches]
        return torch.cat(parts)


@pytest.mark.parametrize("name", ["ZImagePipeline", "HiDreamImagePipeline"])
def test_a_branch_alone_is_its_part_of_the_batch(name):
    pipe, kwargs = tiny(name)
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[OneByOne])
    torch.testing.assert_close(generate(pipe, kwargs), plain, rtol=1e-3, atol=1e-3)


class Again(Probe):
    """Asks twice, and keeps the second answer."""

    name = "again"

    def denoise(self, call, next):
        first = next(call)
        again = next(call)
        assert torch.equal(first, again)
        return again


@pytest.mark.parametrize("name", ["HunyuanDiTControlNetPipeline", "StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"])
def test_a_list_that_the_denoiser_empties_is_whole_for_every_forward(name):
    pipe, kwargs = tiny(name)
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Again])
    assert torch.equal(generate(pipe, kwargs), plain)
    unload(pipe)
    load_pipeline(pipe, plugins=[OneByOne])
    torch.testing.assert_close(generate(pipe, kwargs), plain, rtol=1e-3, atol=1e-3)


LEARNED = ("IFPipeline", "IFInpaintingSuperResolutionPipeline", "KandinskyV22InpaintPipeline", "KandinskyPipeline")
learned = pytest.mark.parametrize("name", LEARNED)


class Halves(Probe):
    """A learned variance is no part of what plugins read in the guidance and in the step, nor is it lost."""

    name = "halves"
    effects = Effects(edits=frozenset({"prediction"}))
    seen: Any = None

    def denoise(self, call, next):
        prediction = next(call)
        assert prediction.shape[1] == 2 * call.latents.shape[1]
        return prediction

    def guide(self, call, next):
        made = call.uncond + call.scale * (call.cond - call.uncond)
        torch.testing.assert_close(made, call.combined, rtol=1e-4, atol=1e-5)
        type(self).seen = made
        return made

    def step(self, call, next):
        assert call.model_output.shape == call.sample.shape
        assert call.model_output is type(self).seen or torch.equal(call.model_output, type(self).seen)
        return next(call)


@learned
def test_a_learned_variance_reaches_the_scheduler_and_no_plugin(name, monkeypatch):
    pipe, kwargs = tiny(name)
    plain, before, given = generate(pipe, kwargs), trace(pipe), []
    load_pipeline(pipe, plugins=[Halves])
    own = pipe.scheduler._get_variance

    def watched(t, predicted_variance=None, **more):
        given.append(predicted_variance)
        return own(t, predicted_variance=predicted_variance, **more)

    monkeypatch.setattr(pipe.scheduler, "_get_variance", watched)
    torch.testing.assert_close(generate(pipe, kwargs), plain, rtol=1e-3, atol=1e-3)
    assert given
    assert all(each is not None for each in given)
    monkeypatch.undo()
    unload(pipe)
    load_pipeline(pipe, plugins=[Everything])
    assert torch.equal(generate(pipe, kwargs), plain)
    unload(pipe)
    assert trace(pipe) == before


@pytest.mark.parametrize("name", ["ZImagePipeline", "HiDreamImagePipeline", "Lumina2Pipeline"])
def test_a_denoiser_that_is_asked_outside_says_the_same(name):
    pipe, kwargs = tiny(name)
    heard = Listening(pipe).conditioning(kwargs)
    texts = heard.whole["cond"], heard.whole["uncond"]
    load_pipeline(pipe, plugins=[OneByOne])
    family = family_of([type(pipe).__name__])[0]
    with pipe.plugins.session() as session:
        said = [session.predict(each, branch) for each, branch in zip(texts, ("cond", "uncond"), strict=True)]
    assert isinstance(said[0], torch.Tensor)
    assert not torch.equal(*said)
    assert torch.equal(ask(family, pipe.transformer, texts[0]), said[0])
    both = {key: join([each[key] for each in texts]) for key in family.conditioning}
    x = torch.cat([each[family.sample] for each in texts])
    t = torch.cat([each[family.timestep] for each in texts])
    again = ask(family, pipe.transformer, {**texts[0], **both, family.sample: x, family.timestep: t})
    torch.testing.assert_close(again, torch.cat(said), rtol=1e-3, atol=1e-3)


# a branch that may be off ------------------------------------------------------------------------------------------------------------

PAG = ("StableDiffusionPAGPipeline", "StableDiffusion3PAGPipeline", "PixArtSigmaPAGPipeline")


@pytest.mark.parametrize("name", PAG)
def test_the_perturbed_branch_runs_while_it_is_asked_for(name):
    pipe, kwargs = tiny(name)
    asked = {
        "uncond+cond+perturbed": {},
        "cond+perturbed": {"guidance_scale": 1.0},
        "both": {"pag_scale": 0.0},
        "cond": {"pag_scale": 0.0, "guidance_scale": 1.0},
    }
    plain = {branch: generate(pipe, kwargs | changes) for branch, changes in asked.items()}
    load_pipeline(pipe, plugins=[Everything])
    for branch, changes in asked.items():
        assert torch.equal(generate(pipe, kwargs | changes), plain[branch]), branch
        assert set(pipe.plugins.report().denoiser_calls) == {branch}


def test_no_branch_is_asked_for_alone_where_layers_know_them_by_place():
    pipe, kwargs = tiny(PAG[0])
    plain = generate(pipe, kwargs | {"pag_scale": 0.0})
    load_pipeline(pipe, plugins=[OneByOne])
    torch.testing.assert_close(generate(pipe, kwargs | {"pag_scale": 0.0}), plain, rtol=1e-3, atol=1e-3)
    with pytest.raises(Unsupported, match=r"1 rows of uncond .* tell uncond, cond, perturbed by their places in a batch of 3"):
        generate(pipe, kwargs)
    unload(pipe)

    class Says(OneByOne):
        effects = Effects(needs=frozenset({"extra_forwards"}))

    with pytest.raises(Unsupported, match=r"one_by_one asks a denoiser by itself"):
        load_pipeline(pipe, plugins=[Says])
