"""Tiny CogView4 pipelines: two blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS = 4


def _glm(vocabulary: int) -> GlmModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GlmModel(GlmConfig(vocab_size=vocabulary, num_key_value_heads=2, head_dim=16, pad_token_id=0, **sizes))


def _vae(still: bool) -> AutoencoderKL:
    """``still``: the control picture's latents are drawn from the global generator, and nothing takes a shift of them away."""
    vae = c.vae(CHANNELS)
    if still:
        bias = vae.post_quant_conv.bias.detach().clone()
        c.still(vae).post_quant_conv.bias.data = bias
    return vae


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    sizes = {"in_channels": CHANNELS * (1 + ("Control" in name)), "out_channels": CHANNELS, "sample_size": 8}
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=_glm(len(tokenizer)),
        vae=_vae("Control" in name),
        transformer=small("CogView4Transformer2DModel", rope_axes_dim=(8, 8), **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 32}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **size, **kwargs)


make = c.maker(
    {
        "CogView4Pipeline": _pipeline,
        "CogView4ControlPipeline": lambda name: _pipeline(name, control_image=c.picture(seed=1)),
    }
)
