"""What plugins of distilled models share: guidance off unless the caller wants it, their own number of steps, LoRA beside the user's."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ConfigError, load_pipeline
from diffgraft.methods.distilled import ensure_own_levels, in_steps, switched_on, together, unguided
from peft import LoraConfig
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


def test_an_adapter_acts_beside_those_that_are_on():
    pipe, _ = tiny("StableDiffusionPipeline")
    unet = pipe.unet
    assert switched_on(unet) == []
    torch.manual_seed(0)
    for name in ("mine", "other", "asleep"):
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), name)
    unet.set_adapters(["mine"], [1.0])
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, unet.config.cross_attention_dim)

    def out():
        with torch.no_grad():
            return unet(x, 500, text).sample

    alone = out()
    with together(unet, {"other": 0.5}):
        assert switched_on(unet) == ["mine", "other"]
        both = out()
    assert torch.equal(out(), alone)
    unet.set_adapters(["mine", "other"], [1.0, 0.5])
    torch.testing.assert_close(both, out())
    assert not torch.equal(both, alone)
    unet.disable_adapters()
    assert switched_on(unet) == []
