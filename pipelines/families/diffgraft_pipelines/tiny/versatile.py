"""Tiny Versatile Diffusion: by a text, by a picture. Their second U-Net, which no picture needs, is left out."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import sd


def _pipeline(name: str, parts: dict[str, object], **call: object) -> Tiny:
    pipe = getattr(diffusers, name)(vae=c.vae(), image_unet=sd.unet(), scheduler=sd.ddim(), **parts)
    return c.finish(pipe, guidance_scale=7.5, height=c.SIDE, width=c.SIDE, **call)


def _text(name: str) -> Tiny:
    tokenizer = c.clip_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": c.clip_text(tokenizer, projection=32), "text_unet": None}
    return _pipeline(name, parts, prompt=c.PROMPT, negative_prompt=c.NEGATIVE)


def _image(name: str) -> Tiny:
    return _pipeline(name, {"image_encoder": c.clip_vision(), "image_feature_extractor": c.clip_image_processor()}, image=c.picture())


make = c.maker({"VersatileDiffusionTextToImagePipeline": _text, "VersatileDiffusionImageVariationPipeline": _image})
