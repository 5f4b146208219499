"""A tiny Allegro pipeline: two blocks, eight frames."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLAllegro, EulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small


def _pipeline(name: str) -> Tiny:
    tokenizer = c.t5_tokenizer()
    vae = AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2)
    vae.enable_tiling()  # it decodes only in tiles, which it makes of at most so many frames and pixels, these apart
    vae.enable_slicing()
    vae.kernel, vae.stride = (8, 32, 32), (8, 16, 16)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 24, "cross_attention_dim": 48, "sample_height": 4, "sample_width": 4}
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.t5_text(tokenizer),
        vae=vae,
        transformer=small("AllegroTransformer3DModel", sample_frames=2, **sizes),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    )
    size = {"height": 32, "width": 32, "num_frames": 8, "max_sequence_length": 32, "clean_caption": False}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=7.5, **size)


make = c.maker({"AllegroPipeline": _pipeline})
