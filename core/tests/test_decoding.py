"""Decoding in mid-run gives what the pipeline's own end gives."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffgraft import Unsupported, load_pipeline, unload
from diffgraft.installed.registry import find_family
from diffgraft.methods.decoding import decode, ensure_decodes, picture_channels, to_latents, to_pixels
from diffgraft_pipelines.tiny import make
from diffusers import WanPipeline
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


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "WanPipeline", "DDPMPipeline"])
def test_in_float32_whatever_the_autoencoder_is_kept_in(name):
    made = make(name)
    pipe, family, latents = made.pipe, find_family(type(made.pipe)), last_latents(made)
    pixels = to_pixels(pipe, family, latents, made.kwargs)
    assert torch.equal(to_pixels(pipe, family, latents, made.kwargs, float32=True), pixels), "nothing is copied that is float32"
    pipe.to(torch.bfloat16)
    kept = {key: value.clone() for key, value in pipe.vae.state_dict().items()} if name != "DDPMPipeline" else {}
    exact = to_pixels(pipe, family, latents.clone().requires_grad_(), made.kwargs, float32=True)
    half = to_pixels(pipe, family, latents.bfloat16(), made.kwargs)
    assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert exact.requires_grad
    back = to_latents(pipe, family, exact.detach(), float32=True)
    for key, value in kept.items():
        assert torch.equal(pipe.vae.state_dict()[key], value), "the pipeline's own is not touched"
    pipe.to(torch.float32)  # its weights stay as they were rounded
    torch.testing.assert_close(exact, to_pixels(pipe, family, latents, made.kwargs), rtol=0, atol=1e-5)
    torch.testing.assert_close(back, to_latents(pipe, family, exact.detach()), rtol=0, atol=1e-5)


def test_float16_where_the_pipeline_itself_decodes_in_it():
    made = make("StableDiffusionPipeline")
    pipe, family = made.pipe, find_family(type(made.pipe))
    pipe.vae.register_to_config(force_upcast=True)  # as diffusers has it where a config does not name it
    pipe.vae.half()
    assert to_pixels(pipe, family, torch.zeros(1, 4, 8, 8, dtype=torch.float16), made.kwargs).dtype == torch.float16


def test_float32_where_an_autoencoder_would_overflow_and_where_it_is_offloaded():
    made = make("StableDiffusionXLPipeline")
    pipe, family = made.pipe, find_family(type(made.pipe))
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.half()
    z = torch.zeros(1, 4, 8, 8, dtype=torch.float16)
    with pytest.raises(Unsupported, match="its vae overflows in float16"):
        to_pixels(pipe, family, z, made.kwargs)
    found = to_pixels(pipe, family, z, made.kwargs, float32=True)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(to_pixels(pipe, family, z, made.kwargs, float32=True), found)
    assert pipe.vae._hf_hook is not None
    pipe.vae.to("meta")
    with pytest.raises(Unsupported, match="offloaded weight by weight"):
        to_pixels(pipe, family, z, made.kwargs, float32=True)


@pytest.mark.parametrize(("in_channels", "patch", "wanted"), [(3, None, 3), (1, None, 1), (12, 2, 3), (3, 4, 3), (3, (2, 2), 3)])
def test_an_autoencoder_that_sees_squares_of_pixels_has_pictures_of_their_channels(in_channels, patch, wanted):
    """Wan 2.2's counts all pixels of a square (12), LTX's and Flux 2's those of the picture."""
    pipe = SimpleNamespace(vae=SimpleNamespace(config={"in_channels": in_channels, "patch_size": patch}))
    assert picture_channels(pipe, find_family(WanPipeline)) == wanted
