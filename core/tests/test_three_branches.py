"""Guidance with a third branch: InstructPix2Pix, whose batch holds "cond", "image" and "uncond"."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from diffgraft import Effects, load_pipeline, unload
from probes import Everything, Probe, generate, tiny, trace

NAMES = ["StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline"]
ORDER = ("cond", "image", "uncond")
every_edit = pytest.mark.parametrize("name", NAMES)


@dataclass
class Kept:
    combined: list[Any] = field(default_factory=list)


class Formula(Probe):
    """The pipelines' own formula, written down once more."""

    name = "formula"
    effects = Effects(edits=frozenset({"prediction"}))

    def guide(self, call, next):
        s_image = call.run.arguments["image_guidance_scale"]
        image = call.branches["image"]
        made = call.uncond + call.scale * (call.cond - image) + s_image * (image - call.uncond)
        assert tuple(call.branches) == ORDER
        assert torch.equal(made, call.combined)
        return made


class RoundTrip(Everything):
    """Puts the latents in that are there."""

    name = "round_trip"
    effects = Effects(edits=frozenset({"latents"}))

    def denoise(self, call, next):
        again = call.with_latents(call.latents.clone())
        assert call.latents.shape[1] == 4
        assert torch.equal(again.sample, call.sample)
        return next(again)


@every_edit
@pytest.mark.parametrize("plugin", [Formula, RoundTrip, Everything])
def test_it_is_the_pipelines_own_bit_for_bit(name, plugin):
    pipe, kwargs = tiny(name)
    plain, before = generate(pipe, kwargs), trace(pipe)
    load_pipeline(pipe, plugins=[plugin])
    assert torch.equal(generate(pipe, kwargs), plain)
    assert pipe.plugins.report().denoiser_calls == {"cond+image+uncond": 4}
    unload(pipe)
    assert trace(pipe) == before


class Alone(Probe):
    """Asks for each branch by itself."""

    name = "alone"
    effects = Effects(needs=frozenset({"extra_forwards"}))
    seen: ClassVar[list[Any]] = []

    def denoise(self, call, next):
        whole = next(call)
        parts = torch.cat([next(call.only(branch)) for branch in call.branches])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
        self.seen.append((call.branches, call.guided, call.texts))
        return whole


@every_edit
def test_each_branch_alone_is_its_part_of_the_batch(name):
    pipe, kwargs = tiny(name)
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Alone])
    Alone.seen.clear()
    assert torch.equal(generate(pipe, kwargs), plain)
    assert set(Alone.seen) == {(ORDER, True, ORDER)}


@every_edit
@pytest.mark.parametrize(("scale", "image_scale"), [(1.0, 1.5), (3.0, 0.9)])
@pytest.mark.parametrize("images", [1, 3])
def test_guidance_that_either_scale_switches_off(name, scale, image_scale, images):
    pipe, kwargs = tiny(name)
    more: dict[str, Any] = {"guidance_scale": scale, "image_guidance_scale": image_scale, "num_images_per_prompt": images}
    plain = generate(pipe, kwargs, **more)
    load_pipeline(pipe, plugins=[Everything])
    assert torch.equal(generate(pipe, kwargs, **more), plain)
    assert pipe.plugins.report().denoiser_calls == {"cond": 4}
