"""A second pipeline of another family than the first: declared by the plugin, met as pixels, anything else refused by name."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffgraft import Need, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.installed.registry import find_family
from diffgraft.methods.decoding import to_pixels
from diffgraft.testing import Subject
from probes import PluginConfig, Probe, generate, tiny
from pydantic import Field


class PriorConfig(PluginConfig):
    model: Any = Field(None, description="a second pipeline")


class Prior(Probe):
    """Looks at the pixels of a second pipeline of another family."""

    name = "prior"
    Config = PriorConfig
    needs = (Need("pipeline", "model", families=("wan", "ltx", "pixel")),)

    def step(self, call, next):
        second = call.given("model")
        shape = {"WanPipeline": (1, second.transformer.config.in_channels, 1, 4, 4)} if hasattr(second, "transformer") else {}
        z = torch.zeros(shape.get(type(second).__name__, (1, 3, 8, 8)))
        call.note(f"pixels {tuple(to_pixels(second, find_family(type(second)), z, {}, float32=True).shape)}")
        return next(call)


def test_a_second_pipeline_of_another_family_that_is_declared():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    for name, shape in (("WanPipeline", r"\(1, 3, 1, .*\)"), ("DDPMPipeline", r"\(1, 3, 8, 8\)")):
        second = tiny(name)[0].to(torch.bfloat16)
        load_pipeline(pipe, plugins=[Prior(model=second)])
        assert torch.equal(generate(pipe, kwargs), plain)
        assert re.fullmatch(f"pixels {shape}", pipe.plugins.report().plugins["prior"].notes[0])
        assert {second.components[part].dtype for part in ("transformer", "unet", "vae") if part in second.components} == {torch.bfloat16}
        unload(pipe)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("FluxPipeline", "prior: model = FluxPipeline does not fit: FluxPipeline is of the family 'flux', and it takes wan, ltx, pixel"),
        ("StableDiffusionPipeline", "StableDiffusionPipeline is of the family 'sd', and it takes wan, ltx, pixel"),
        ("LTXPipeline", "LTXPipeline has no autoencoder of which it is known how the latents become pictures"),
    ],
)
def test_one_of_a_family_that_is_not_declared_or_has_no_pixels_is_refused(name, why):
    pipe = tiny("StableDiffusionPipeline")[0]
    with pytest.raises(Unsupported, match=why):
        load_pipeline(pipe, plugins=[Prior(model=tiny(name)[0])])
    assert not hasattr(pipe, "plugins")


def test_the_contract_suite_gives_one_of_the_first_declared_family_that_has_pixels():
    """LTX, the first by name, has none that are known."""
    subject = Subject(Prior, registry.families()["sd"], "StableDiffusionPipeline")
    assert type(subject.instance().config.model).__name__ == "DDPMPipeline"
    assert subject.seconds(subject.attach(subject.make())) == [], "none of this family"
