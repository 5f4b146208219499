"""A plugin's scheduler may rewrite timesteps that were not used yet: the pipeline's loop, the denoiser and the run's facts follow."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from diffgraft import load_pipeline
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from probes import Effects, Probe, generate, tiny

WANTED = [0, 700.0, 321.0, 20.0, 20.0, 20.0]
"""What calls 1 to 5 are told; the last two are answered without the denoiser."""


def rewriting(base):
    class Rewriting(base):
        def set_timesteps(self, *args, **kwargs):
            super().set_timesteps(*args, **kwargs)
            self.timesteps, self.made = self.timesteps.float(), 0

        def step(self, model_output, timestep, sample, *args, **kwargs):
            self.made += 1
            if self.made < len(self.timesteps):
                self.timesteps[self.made :] = WANTED[self.made]
            return (sample if self.made > 4 else sample - 0.01 * model_output[:, : sample.shape[1]],)

    return Rewriting


class Rewrites(Probe):
    name = "rewrites"
    effects = Effects(replaces=frozenset({"scheduler"}), skips=frozenset({"denoiser"}))
    scheduler = DDIMScheduler
    told: ClassVar[list[float]] = []
    facts: ClassVar[list[float]] = []
    samples: ClassVar[list[torch.Tensor]] = []

    def make_scheduler(self, old, family):
        base = FlowMatchEulerDiscreteScheduler if family.prediction == "flow" else DDIMScheduler
        return rewriting(base).from_config(old.config)

    def denoise(self, call, next):
        self.told.append(float(call.timestep.flatten()[0]) / call.family.timestep_scale)
        if call.step.index > 3:
            return self.last
        self.last = next(call)
        return self.last

    def step(self, call, next):
        self.facts.append(float(call.step.t))
        out = next(call)
        self.samples.append(out.sample)
        return out


@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "FluxPipeline", "DiTPipeline", "PixArtAlphaPipeline",
             "StableDiffusion3Pipeline", "WanPipeline", "LTXPipeline", "QwenImagePipeline"],
)  # fmt: skip
def test_rewritten_timesteps_are_followed(name):
    pipe, kwargs = tiny(name)
    for seen in (Rewrites.told, Rewrites.facts, Rewrites.samples):
        seen.clear()
    load_pipeline(pipe, plugins=[Rewrites])
    generate(pipe, kwargs, num_inference_steps=6)
    report = pipe.plugins.report()
    asked = Rewrites.told[:: len(Rewrites.told) // 6]
    assert asked[1:] == pytest.approx(WANTED[1:], rel=1e-5)
    assert Rewrites.facts[1:] == pytest.approx(WANTED[1:], rel=1e-5)
    assert set(report.forwards.values()) == {4}
    assert set(report.denoiser_calls.values()) == {6}
    assert torch.equal(Rewrites.samples[3], Rewrites.samples[5])
