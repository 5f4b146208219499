"""Tiny SkyReels-V2 pipelines: three latent frames, with diffusion forcing all at one time (``ar_step`` 0)."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import SkyReelsV2Transformer3DModel

from diffgraft_pipelines.tiny import _common as c

SIDE = 32
CHANNELS = 8
FRAMES = 9


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    image = name == "SkyReelsV2ImageToVideoPipeline"  # mask, start picture and its CLIP features
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * CHANNELS + 4 if image else CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=64,
        image_dim=32 if image else None,
        added_kv_proj_dim=24 if image else None,
    )
    vae = c.wan_vae(CHANNELS)
    more = {"image_encoder": c.clip_vision(), "image_processor": c.clip_image_processor()} if image else {}
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.umt5_text(tokenizer),
        transformer=transformer,
        vae=vae,
        scheduler=c.flow_unipc(8.0),
        **more,
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=5.0,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        max_sequence_length=32,
        **kwargs,
    )


make = c.maker(
    {
        "SkyReelsV2Pipeline": _pipeline,
        "SkyReelsV2ImageToVideoPipeline": lambda name: _pipeline(name, image=c.picture(SIDE)),
        "SkyReelsV2DiffusionForcingPipeline": _pipeline,
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": lambda name: _pipeline(name, image=c.picture(SIDE)),
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": lambda name: _pipeline(
            name,
            video=c.video(5, SIDE),
            overlap_history=5,  # diffusers fails without it
        ),
    }
)
