"""Tiny Stable Diffusion 3 pipelines: three blocks, three text encoders."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler, SD3ControlNetModel, SD3Transformer2DModel

from diffgraft_pipelines.tiny import _common as c


def _pipeline(name: str, **kwargs: object) -> Tiny:
    t5 = c.t5_tokenizer()
    tokenizer = c.clip_tokenizer()
    sizes = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 3,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 32,
        "qk_norm": "rms_norm",
    }
    transformer = SD3Transformer2DModel(**sizes)
    more = {}
    if "ControlNet" in name:  # of inpainting with the mask behind the picture
        more["controlnet"] = SD3ControlNetModel(
            extra_conditioning_channels=int("Inpaint" in name), force_zeros_for_pooled_projection=False, **sizes
        )
        vae = c.still(c.vae(16, shift_factor=c.MEAN, scaling_factor=1.5))
    else:
        vae = c.vae(16, shift_factor=0.06, scaling_factor=1.5)
    pipe = getattr(diffusers, name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=c.clip_text(tokenizer, projection=16, hidden=16),
        tokenizer=tokenizer,
        text_encoder_2=c.clip_text(tokenizer, projection=16, hidden=16),
        tokenizer_2=c.clip_tokenizer(),
        text_encoder_3=c.t5_text(t5),
        tokenizer_3=t5,
        **more,
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=5.0,
        height=c.SIDE,
        width=c.SIDE,
        max_sequence_length=32,
        **kwargs,
    )


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8)


def _control(name: str) -> Tiny:
    return _pipeline(name, control_image=c.picture(seed=1))


def _control_inpaint(name: str) -> Tiny:
    return _pipeline(name, control_image=c.picture(), control_mask=c.mask())


make = c.maker(
    {
        "StableDiffusion3Pipeline": _pipeline,
        "StableDiffusion3Img2ImgPipeline": _image,
        "StableDiffusion3InpaintPipeline": _inpaint,
        "StableDiffusion3ControlNetPipeline": _control,
        "StableDiffusion3ControlNetInpaintingPipeline": _control_inpaint,
    }
)
