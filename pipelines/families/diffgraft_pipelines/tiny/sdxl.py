"""Tiny Stable Diffusion XL pipelines."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import ControlNetModel, EulerDiscreteScheduler, UNet2DConditionModel

from diffgraft_pipelines.tiny import _common as c

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _unet(in_channels: int) -> UNet2DConditionModel:
    """Three levels, the outer one without attention as in SDXL, two layers a block."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=64,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )


def _pipeline(name: str, in_channels: int = 4, **kwargs: object) -> Tiny:
    tokenizer = c.clip_tokenizer()
    parts = {
        "vae": c.vae(),
        "text_encoder": c.clip_text(tokenizer),
        "text_encoder_2": c.clip_text(tokenizer, projection=32),
        "tokenizer": tokenizer,
        "tokenizer_2": c.clip_tokenizer(),
        "unet": _unet(in_channels),
        "scheduler": EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    }
    if "ControlNet" in name:
        parts["controlnet"] = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    pipe = getattr(diffusers, name)(**parts, add_watermarker=False)
    if name != "StableDiffusionXLImg2ImgPipeline":  # its size is the picture's
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


make = c.maker(
    {
        "StableDiffusionXLPipeline": _pipeline,
        "StableDiffusionXLImg2ImgPipeline": _image,
        "StableDiffusionXLInpaintPipeline": _inpaint,
        "StableDiffusionXLInstructPix2PixPipeline": _edit,
        "StableDiffusionXLControlNetPipeline": _control,
        "StableDiffusionXLControlNetImg2ImgPipeline": _control_image,
        "StableDiffusionXLControlNetInpaintPipeline": _control_inpaint,
    }
)
