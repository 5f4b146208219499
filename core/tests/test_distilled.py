"""What plugins of distilled models share: guidance off unless the caller wants it, their own number of steps and levels."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ConfigError, load_pipeline
from diffgraft.methods.distilled import ensure_own_levels, in_steps, unguided
from probes import Probe, generate, tiny


class Few(Probe):
    name = "few"
    families = ("*",)

    def run(self, call, next):
        ensure_own_levels(call, "own=True")
        return next(in_steps(unguided(call, "guidance='keep'"), 2, "steps=None"))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline", "FluxPipeline"])
def test_a_call_that_says_nothing_is_in_few_steps_without_guidance(name):
    pipe, kwargs = tiny(name)
    few = {key: value for key, value in kwargs.items() if key not in ("num_inference_steps", "guidance_scale", "true_cfg_scale")}
    plain = generate(pipe, {**few, "num_inference_steps": 2, **({} if name == "FluxPipeline" else {"guidance_scale": 1.0})})
    load_pipeline(pipe, plugins=[Few()])
    assert torch.equal(generate(pipe, few), plain)
    report = pipe.plugins.report()
    assert report.steps == 2
    if name != "FluxPipeline":  # its own scale is an input of the model
        assert any("guidance is off" in note for note in report.plugins["few"].notes)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"guidance_scale": 3.0}, "guidance_scale = 3: .*leave guidance_scale out .*or say guidance='keep'"),
        ({"num_inference_steps": 5}, "num_inference_steps = 5, and what was distilled knows 2: .*or say steps=None"),
        ({"timesteps": [900, 500], "num_inference_steps": 2}, "says timesteps itself, .*or say own=True"),
    ],
)
def test_what_a_distilled_model_does_not_know_is_refused(more, text):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    few = {key: value for key, value in kwargs.items() if key not in ("num_inference_steps", "guidance_scale")}
    load_pipeline(pipe, plugins=[Few()])
    with pytest.raises(ConfigError, match=f"plugin 'few': .*{text}"):
        generate(pipe, {**few, **more})
    assert torch.isfinite(generate(pipe, {**few, "guidance_scale": 1.0, "num_inference_steps": 2})).all()
