"""A tiny ERNIE-Image pipeline: two blocks, no prompt enhancer."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS = 4


def _pipeline(name: str) -> Tiny:
    tokenizer = c.chat_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4, sample_size=c.SIDE
    )
    sizes = {"in_channels": 4 * CHANNELS, "out_channels": 4 * CHANNELS, "ffn_hidden_size": 64, "text_in_dim": WIDTH}
    pipe = getattr(diffusers, name)(
        transformer=small("ErnieImageTransformer2DModel", **sizes),
        vae=vae,
        text_encoder=c.qwen3_text(tokenizer),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
    )
    size = {"height": c.SIDE, "width": c.SIDE}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, **size)


make = c.maker({"ErnieImagePipeline": _pipeline})
