"""A tiny AuraFlow pipeline: two joint and two single blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small


def _pipeline(name: str) -> Tiny:
    tokenizer = c.t5_tokenizer()
    layers = {"num_mmdit_layers": 2, "num_single_dit_layers": 2}
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.umt5_text(tokenizer),
        vae=c.vae(),
        transformer=small("AuraFlowTransformer2DModel", sample_size=8, **layers),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 40}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=3.5, **size)


make = c.maker({"AuraFlowPipeline": _pipeline})
