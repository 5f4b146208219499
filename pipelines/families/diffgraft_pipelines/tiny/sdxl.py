"""Tiny Stable Diffusion XL pipelines."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import ControlNetModel, ControlNetUnionModel, EulerDiscreteScheduler, T2IAdapter, UNet2DConditionModel

from diffgraft_pipelines.tiny import _common as c

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

SIZES = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": 64,
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}
"""Of the U-Net and of a ControlNet for it."""


def unet(in_channels: int) -> UNet2DConditionModel:
    """Three levels, the outer one without attention as in SDXL, two layers a block."""
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    return UNet2DConditionModel(sample_size=8, in_channels=in_channels, up_block_types=up, **SIZES)


def _union() -> ControlNetUnionModel:
    """For six kinds of control pictures, which a small transformer of its own mixes."""
    mixing = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    return ControlNetUnionModel(conditioning_embedding_out_channels=(4, 4, 8, 8), **mixing, **SIZES)


def _pipeline(name: str, in_channels: int = 4, **kwargs: object) -> Tiny:
    tokenizer = c.clip_tokenizer()
    parts = {
        "vae": c.vae(),
        "text_encoder": c.clip_text(tokenizer),
        "text_encoder_2": c.clip_text(tokenizer, projection=32),
        "tokenizer": tokenizer,
        "tokenizer_2": c.clip_tokenizer(),
        "unet": unet(in_channels),
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    }
    if "Union" in name:
        parts["controlnet"] = _union()
        kwargs["control_mode"] = 1
    elif "ControlNet" in name:
        parts["controlnet"] = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    if "Adapter" in name:
        parts["adapter"] = T2IAdapter(3, [16, 32, 32, 32], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl")
    else:
        parts["add_watermarker"] = False
    pipe = getattr(diffusers, name)(**parts)
    if "control_image" in kwargs or "Img2Img" not in name:  # its size is the picture's
        kwargs |= {"height": c.SIDE, "width": c.SIDE}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **kwargs)


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8)


def _edit(name: str) -> Tiny:
    return _pipeline(name, 8, image=c.picture(), image_guidance_scale=1.5)


def _control(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(seed=1))


def _control_image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), control_image=c.picture(seed=1), strength=0.8)


def _control_inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), control_image=c.picture(seed=1), strength=0.8)


def _union_control(name: str) -> Tiny:
    return _pipeline(name, control_image=[c.picture(seed=1)])


make = c.maker(
    {
        "StableDiffusionXLPipeline": _pipeline,
        "StableDiffusionXLImg2ImgPipeline": _image,
        "StableDiffusionXLInpaintPipeline": _inpaint,
        "StableDiffusionXLInstructPix2PixPipeline": _edit,
        "StableDiffusionXLControlNetPipeline": _control,
        "StableDiffusionXLControlNetImg2ImgPipeline": _control_image,
        "StableDiffusionXLControlNetInpaintPipeline": _control_inpaint,
        "StableDiffusionXLControlNetUnionPipeline": _union_control,
        "StableDiffusionXLAdapterPipeline": _control,
        "StableDiffusionXLModularPipeline": lambda name: c.modular(name, _pipeline("StableDiffusionXLPipeline")),
        "StableDiffusionXLControlNetUnionImg2ImgPipeline": _control_image,
        "StableDiffusionXLControlNetUnionInpaintPipeline": _control_inpaint,
    }
)
