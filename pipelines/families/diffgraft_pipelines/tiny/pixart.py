"""Tiny PixArt pipelines: three blocks, learned sigma."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from diffgraft_pipelines.tiny import _common as c


def _pipeline(name: str) -> Tiny:
    tokenizer = c.t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=3,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=32,
        caption_channels=32,
    )
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.t5_text(tokenizer),
        vae=c.vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=4.5,
        height=c.SIDE,
        width=c.SIDE,
        max_sequence_length=32,
        clean_caption=False,
        use_resolution_binning=False,
    )


make = c.maker({"PixArtAlphaPipeline": _pipeline, "PixArtSigmaPipeline": _pipeline})
