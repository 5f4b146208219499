"""A tiny CogView3 plus pipeline: two blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import CogVideoXDDIMScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small


def _pipeline(name: str) -> Tiny:
    tokenizer = c.t5_tokenizer()
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 4.0,
        "timestep_spacing": "trailing",
    }
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.t5_text(tokenizer),
        vae=c.vae(),
        transformer=small("CogView3PlusTransformer2DModel", in_channels=4, out_channels=4, sample_size=8, pos_embed_max_size=16),
        scheduler=CogVideoXDDIMScheduler(**schedule),
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 40}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **size)


make = c.maker({"CogView3PlusPipeline": _pipeline})
