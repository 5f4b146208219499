"""Tiny Chroma pipelines: two double and two single blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small

CHANNELS = 4


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    sizes = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=c.vae(CHANNELS, shift_factor=0.1, scaling_factor=0.36),
        text_encoder=c.t5_text(tokenizer),
        tokenizer=tokenizer,
        transformer=small("ChromaTransformer2DModel", in_channels=4 * CHANNELS, **sizes),
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 40}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=3.0, **size, **kwargs)


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


make = c.maker({"ChromaPipeline": _pipeline, "ChromaImg2ImgPipeline": _image})
