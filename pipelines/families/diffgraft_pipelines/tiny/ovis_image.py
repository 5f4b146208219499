"""A tiny Ovis-Image pipeline: two double and two single blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small

CHANNELS = 4


def _pipeline(name: str) -> Tiny:
    tokenizer = c.chat_tokenizer()
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=c.vae(CHANNELS, shift_factor=0.1),
        text_encoder=c.qwen3_text(tokenizer).model,
        tokenizer=tokenizer,
        transformer=small("OvisImageTransformer2DModel", in_channels=4 * CHANNELS, out_channels=4 * CHANNELS),
    )
    pipe.system_prompt, pipe.user_prompt_begin_id = "", 0  # the tokenizer would spell them
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 32}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **size)


make = c.maker({"OvisImagePipeline": _pipeline})
