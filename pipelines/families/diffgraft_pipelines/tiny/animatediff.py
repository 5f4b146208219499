"""Tiny AnimateDiff pipelines: the U-Net of tiny Stable Diffusion with motion modules, four frames."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import ControlNetModel, MotionAdapter

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import sd

FRAMES = 4
SIDE = 32


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer, unet = c.clip_tokenizer(), sd.unet()
    parts = {
        "vae": c.vae(),
        "text_encoder": c.clip_text(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet,
        "motion_adapter": MotionAdapter(
            block_out_channels=(16, 32, 32), motion_num_attention_heads=4, motion_norm_num_groups=8
        ),
        "scheduler": sd.ddim(),
    }
    if "ControlNet" in name:
        parts["controlnet"] = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    return c.finish(
        getattr(diffusers, name)(**parts), prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=7.5, **kwargs
    )


def _text(name: str) -> Tiny:
    return _pipeline(name, num_frames=FRAMES, height=SIDE, width=SIDE)


def _video(name: str) -> Tiny:
    return _pipeline(name, video=c.video(FRAMES, SIDE), height=SIDE, width=SIDE, strength=0.8)


def _control(name: str) -> Tiny:
    return _pipeline(name, num_frames=FRAMES, height=SIDE, width=SIDE, conditioning_frames=c.video(FRAMES, SIDE))


make = c.maker(
    {
        "AnimateDiffPipeline": _text,
        "AnimateDiffVideoToVideoPipeline": _video,
        "AnimateDiffControlNetPipeline": _control,
    }
)
