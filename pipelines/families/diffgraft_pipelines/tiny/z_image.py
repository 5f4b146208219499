"""Tiny Z-Image pipelines: two blocks of each kind."""

from __future__ import annotations

from typing import Any

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small

CHANNELS = 4
SIZES: dict[str, Any] = {"n_refiner_layers": 2}


def _pipeline(name: str, **kwargs: Any) -> Tiny:
    tokenizer = c.chat_tokenizer()
    parts = {}
    if "ControlNet" in name:
        control = 2 * CHANNELS + 1 if "Inpaint" in name else CHANNELS
        places: dict[str, Any] = {"control_layers_places": [0, 1], "control_refiner_layers_places": [0, 1]}
        parts["controlnet"] = small("ZImageControlNetModel", control_in_dim=control, **places, **SIZES)
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=c.vae(CHANNELS, shift_factor=0.1),
        text_encoder=c.qwen3_text(tokenizer),
        tokenizer=tokenizer,
        transformer=small("ZImageTransformer2DModel", in_channels=CHANNELS, **SIZES),
        **parts,
    )
    if "strength" not in kwargs:  # else the size is the picture's
        kwargs |= {"height": c.SIDE, "width": c.SIDE}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, max_sequence_length=32, **kwargs)


def _picture(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8)


def _control(name: str) -> Tiny:
    given = {"image": c.picture(seed=1), "mask_image": c.mask()} if "Inpaint" in name else {}
    return _pipeline(name, control_image=c.picture(), **given)


make = c.maker(
    {
        "ZImagePipeline": _pipeline,
        "ZImageImg2ImgPipeline": _picture,
        "ZImageInpaintPipeline": _inpaint,
        "ZImageControlNetPipeline": _control,
        "ZImageControlNetInpaintPipeline": _control,
    }
)
