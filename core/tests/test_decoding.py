"""Decoding in mid-run gives what the pipeline's own end gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffgraft import Unsupported, load_pipeline, unload
from diffgraft.installed.registry import find_family
from diffgraft.methods.decoding import decode, ensure_decodes, to_latents, to_pixels
from diffgraft_pipelines.tiny import make
from probes import Probe


def call(made, output_type):
    generator = torch.Generator().manual_seed(0)
    return made.pipe(**{**made.kwargs, "num_inference_steps": 1, "output_type": output_type}, generator=generator)[0]


def last_latents(made):
    """What the last step gives, one copy a sample: some pipelines have no ``output_type="latent"``."""
    seen = []

    def step(self, call, next):
        out = next(call)
        seen.append(out.sample.chunk(2)[0] if call.family.guidance.doubled else out.sample)
        return out

    load_pipeline(made.pipe, plugins=[type("Last", (Probe,), {"name": "last", "step": step})])
    try:
        call(made, "pil")
    finally:
        unload(made.pipe)
    return seen[-1]


NAMES = (
    "DDPMPipeline", "DiTPipeline", "FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline", "QwenImagePipeline",
    "WanPipeline",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_as_the_pipeline_itself(name):
    made = make(name)
    found = decode(made.pipe, find_family(type(made.pipe)), last_latents(made), made.kwargs)
    wanted = call(made, "pil")
    apart = np.abs(np.asarray(found).astype(int) - np.asarray(wanted)).max()
    assert apart <= (1 if name == "DiTPipeline" else 0)  # DiT multiplies by 1 / scaling_factor where the others divide
    if name == "WanPipeline":
        assert len(found[0]) == 5


def test_the_size_may_be_the_models():
    made = make("FluxPipeline")
    family = find_family(type(made.pipe))
    side = made.pipe.default_sample_size * made.pipe.vae_scale_factor
    tokens = torch.zeros(1, (made.pipe.default_sample_size // 2) ** 2, 16)
    assert decode(made.pipe, family, tokens, {})[0].size == (side, side)


@pytest.mark.parametrize("name", ["LTXPipeline", "CogVideoXPipeline", "AnimateDiffPipeline"])
def test_layouts_that_are_not_known_are_refused(name):
    made = make(name)
    with pytest.raises(Unsupported, match=type(made.pipe).__name__):
        ensure_decodes(made.pipe, find_family(type(made.pipe)))


@pytest.mark.parametrize("name", NAMES)
def test_pixels_and_back_are_the_autoencoders_and_carry_gradients(name):
    made = make(name)
    pipe, family = made.pipe, find_family(type(made.pipe))
    latents = last_latents(made).clone().requires_grad_()
    pixels = to_pixels(pipe, family, latents, made.kwargs)
    (gradient,) = torch.autograd.grad(pixels.square().sum(), latents)
    assert gradient.abs().sum() > 0
    assert pixels.shape[1] == 3
    if name == "QwenImagePipeline":
        with pytest.raises(Unsupported, match="autoencoder for video"):
            to_latents(pipe, family, pixels)
        return
    back = to_latents(pipe, family, pixels.detach())
    assert back.shape == latents.shape
    if name == "DDPMPipeline":
        assert torch.equal(back, latents)
        return
    posterior = pipe.vae.encode(pixels.detach()).latent_dist.mode()
    again = to_pixels(pipe, family, back, made.kwargs)  # right only if both ways have the same scale and layout
    assert torch.allclose(again, pipe.vae.decode(posterior, return_dict=False)[0], atol=1e-5)
