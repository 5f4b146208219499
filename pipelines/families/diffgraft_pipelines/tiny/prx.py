"""A tiny PRX pipeline: two blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small


def _pipeline(name: str) -> Tiny:
    tokenizer = c.t5_tokenizer()
    pipe = getattr(diffusers, name)(
        transformer=small("PRXTransformer2DModel", in_channels=4, context_in_dim=WIDTH, axes_dim=(8, 8)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=c.t5_text(tokenizer),
        tokenizer=tokenizer,
        vae=c.vae(shift_factor=0.1),
        default_sample_size=c.SIDE,
    )
    size = {"height": c.SIDE, "width": c.SIDE, "use_resolution_binning": False, "tokenizer_max_length": 32}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, **size)


make = c.maker({"PRXPipeline": _pipeline})
