"""Distribution matching: the gradient in closed form, who learns from what, and that a fit of two goes on where it stopped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffgraft import ConfigError, Need, PluginConfig
from diffgraft.methods.examples import Example
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.matching import MatchingFitter, along, matching_gradient
from diffgraft.methods.predictions import SignalNoise, clean_estimate, prediction_target
from probes import Probe, tiny
from pydantic import Field


class Student(PluginConfig):
    lora: str | None = Field(None, description="a LoRA of few steps")


class OneStepFitter(MatchingFitter):
    """A student of one step from pure noise."""

    def sample(self, session, batch, calls):
        x = torch.randn(calls["cond"][self.probe.target.family.sample].shape, generator=batch.generator)
        levels, t = self.levels_at(torch.ones(len(x)), x)
        return clean_estimate(x, self.predict(session, x, t, calls["cond"], "fit"), levels, self.kind)


class OneStep(Probe):
    name = "one_step"
    Config = Student
    needs = (Need("adapter", "lora"),)
    fitting = OneStepFitter


class Seen(OneStepFitter):
    """Keeps which weights each loss reached."""

    def loss(self, session, batch):
        losses = super().loss(session, batch)
        moving = {name: value for name, value in self.values().items()}
        grads = torch.autograd.grad(losses.mean(), list(moving.values()), allow_unused=True, retain_graph=True)
        seen.append({name for name, grad in zip(moving, grads, strict=True) if grad is not None})
        return losses


class Watched(OneStep):
    fitting = Seen


seen: list[set[str]] = []
SETTINGS = CallSettings(steps=2, guidance_scale=2.0, height=32, width=32)
EXAMPLES = [Example(text) for text in ("an apple", "a star", "a boat")]


def learn(name, out, plugin, steps=4, **knobs):
    pipe, _ = tiny(name)
    return fit(pipe, plugin, EXAMPLES, SETTINGS, out, FitPlan(steps, 2), knobs={"rank": 2, "student_every": 2, **knobs})


def test_the_gradient_is_that_of_the_divergence():
    """Of N(m, 1) from N(0, 1): the clean samples that the scores imply differ by m s^2 / (a^2 + s^2), so the sample goes towards 0."""
    m, a, s = 3.0, 0.8, 0.6
    x = m + torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    noisy = a * x + s * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gain = a / (a * a + s * s)
    fake, real = m + gain * (noisy - a * m), gain * noisy
    gradient = matching_gradient(x, fake, real)
    assert torch.allclose(fake - real, torch.full_like(x, m * s * s / (a * a + s * s)), atol=1e-5)
    assert torch.allclose(gradient * (x - real).abs().mean((1, 2, 3), keepdim=True), fake - real, atol=1e-5)
    x.requires_grad_()
    along(x, gradient).sum().backward()
    assert torch.allclose(x.grad * x[0].numel(), gradient, atol=1e-5)
    assert not matching_gradient(x, real, real).any()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_target_of_a_prediction_gives_the_clean_sample(kind):
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    levels = SignalNoise(torch.tensor(0.4), torch.tensor(0.6)) if kind == "flow" else SignalNoise(torch.tensor(0.8), torch.tensor(0.6))
    x = levels.a * x0 + levels.s * noise
    assert torch.allclose(clean_estimate(x, prediction_target(x0, noise, levels, kind), levels, kind), x0, atol=1e-5)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "WanPipeline"])
def test_student_and_fake_learn_each_from_its_own(name, tmp_path):
    seen.clear()
    more = {"teacher_guidance": 1.0} if name == "FluxPipeline" else {}  # its guidance is an input of the model
    found = learn(name, tmp_path / "one.safetensors", Watched(), **more)
    fakes = {name for name in found.tensors if ".fake." in name}
    students = {name for name in found.tensors if ".fit." in name}
    assert fakes
    assert students
    assert len(fakes) + len(students) == len(found.tensors)
    assert seen == [fakes | students, fakes, fakes | students, fakes]
    moved = {name for name, value in found.tensors.items() if "lora_B" in name and value.any()}  # B begins at 0
    assert any(".fit." in name for name in moved)
    assert any(".fake." in name for name in moved)


def test_what_is_written_is_the_students_and_goes_on(tmp_path):
    from safetensors.torch import load_file

    whole, again = tmp_path / "whole.safetensors", tmp_path / "again.safetensors"
    learn("StableDiffusionPipeline", whole, OneStep())

    def stop(phase, done, total):
        if done == 3:
            raise KeyboardInterrupt

    pipe, _kwargs = tiny("StableDiffusionPipeline")
    plan, knobs = FitPlan(4, 2), {"rank": 2, "student_every": 2}
    with pytest.raises(KeyboardInterrupt):
        fit(pipe, OneStep(), EXAMPLES, SETTINGS, again, FitPlan(4, 2, keep_every=0), knobs=knobs, on_progress=stop)
    fit(pipe, OneStep(), EXAMPLES, SETTINGS, again, plan, knobs=knobs)
    assert whole.read_bytes() == again.read_bytes()
    tensors = load_file(whole)
    assert tensors
    assert not any("fake" in name for name in tensors)
    assert not hasattr(pipe.unet, "peft_config")


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"teacher_guidance": 0.5}, "teacher_guidance"),
        ({"t_low": 0.9, "t_high": 0.1}, "t_low = 0.9 is not below t_high = 0.1"),
        ({"t_high": 1.0}, "t_high"),
    ],
)
def test_bad_knobs_are_told(knobs, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        learn("StableDiffusionPipeline", tmp_path / "x.safetensors", OneStep(), **knobs)


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_a_teacher_without_guidance_is_none_with_it(name, tmp_path):
    """A call without guidance has no branch to guide with: the teacher would silently be another."""
    pipe, _ = tiny(name)
    settings, out = replace(SETTINGS, guidance_scale=1.0, extra={}), tmp_path / "x.safetensors"
    with pytest.raises(ConfigError, match=r"teacher_guidance = 2, and the call has no guidance.*--set teacher_guidance=1"):
        fit(pipe, OneStep(), EXAMPLES, settings, out, FitPlan(1, 2), knobs={"rank": 2})
    assert not list(tmp_path.iterdir())
    fit(pipe, OneStep(), EXAMPLES, settings, out, FitPlan(1, 2), knobs={"rank": 2, "teacher_guidance": 1.0})
