"""Tiny Stable Diffusion pipelines (``StableDiffusionInpaintPipeline@9`` is the inpainting U-Net with nine channels)."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler, LCMScheduler, T2IAdapter, UNet2DConditionModel
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil, XLMRobertaTokenizer

from diffgraft_pipelines.tiny import _common as c

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet(in_channels: int = 4, time_cond: int | None = None, **config: object) -> UNet2DConditionModel:
    """Three levels, two with attention, two layers a block."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        time_cond_proj_dim=time_cond,
        **config,
    )


def ddim() -> DDIMScheduler:
    """The DDIM scheduler of Stable Diffusion."""
    return DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _tongues() -> XLMRobertaTokenizer:
    """Of the printable ASCII characters; its encoder is made for many languages."""
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*special, ("▁", -2.0), *letters, ("<mask>", 0.0)], model_max_length=77)


def _many_tongues() -> dict[str, object]:
    """The text encoder of AltDiffusion."""
    tokenizer = _tongues()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = RobertaSeriesConfig(vocab_size=len(tokenizer), project_dim=32, pad_token_id=1, max_position_embeddings=80, **sizes)
    return {"tokenizer": tokenizer, "text_encoder": RobertaSeriesModelWithTransformation(config)}


def _pipeline(name: str, in_channels: int = 4, **kwargs: object) -> Tiny:
    tokenizer = c.clip_tokenizer()
    lcm = name.startswith("LatentConsistency")
    parts = {
        "vae": c.vae(in_channels=6, out_channels=6) if "LDM3D" in name else c.vae(),  # colours, depth
        "text_encoder": c.clip_text(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet(in_channels, 16 if lcm else None),
        "scheduler": LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False) if lcm else ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    if "LDM3D" in name:
        parts["image_encoder"] = None
    if name.startswith("Alt"):
        parts |= _many_tongues()
    if "ControlNet" in name:
        parts["controlnet"] = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 4, 8, 8))
    if "Adapter" in name:
        parts["adapter"] = T2IAdapter(3, [16, 32, 32], num_res_blocks=1, downscale_factor=8)
    if not lcm:
        kwargs["negative_prompt"] = c.NEGATIVE
    pipe = getattr(diffusers, name)(**parts)
    return c.finish(pipe, prompt=c.PROMPT, guidance_scale=7.5, **kwargs)


def _text(name: str) -> Tiny:
    return _pipeline(name, height=c.SIDE, width=c.SIDE)


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str, in_channels: int = 4) -> Tiny:
    return _pipeline(name, in_channels, image=c.picture(), mask_image=c.mask(), height=c.SIDE, width=c.SIDE, strength=0.8)


def _edit(name: str) -> Tiny:
    return _pipeline(name, 8, image=c.picture(), image_guidance_scale=1.5)


def _upscale(name: str) -> Tiny:
    """The picture's own pixels are behind the latents, and a noise level for it in the place of a class."""
    tokenizer = c.clip_tokenizer()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=c.SIDE,
    )
    pipe = getattr(diffusers, name)(
        vae=vae,
        text_encoder=c.clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet(7, num_class_embeds=1000),
        low_res_scheduler=DDPMScheduler(**BETAS),
        scheduler=ddim(),
    )
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=7.5, image=c.picture(16), noise_level=20)


def _depth(name: str) -> Tiny:
    """Of the picture's depth, which a model finds, one channel more."""
    tokenizer = c.clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    picture = {"image_size": 32, "patch_size": 16, "is_hybrid": False}
    head = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8, "reassemble_factors": [1] * 4}
    pipe = getattr(diffusers, name)(
        vae=c.vae(),
        text_encoder=c.clip_text(tokenizer),
        tokenizer=tokenizer,
        unet=unet(5),
        scheduler=ddim(),
        depth_estimator=DPTForDepthEstimation(DPTConfig(**sizes, **picture, **head)),
        feature_extractor=DPTImageProcessorPil(size={"height": 32, "width": 32}),
    )
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=7.5, image=c.picture(), strength=0.8)


def _control(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(seed=1), height=c.SIDE, width=c.SIDE)


def _control_image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), control_image=c.picture(seed=1), strength=0.8)


def _control_inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), control_image=c.picture(seed=1), strength=0.8)


make = c.maker(
    {
        "StableDiffusionPipeline": _text,
        "StableDiffusionImg2ImgPipeline": _image,
        "StableDiffusionInpaintPipeline": _inpaint,
        "StableDiffusionInpaintPipeline@9": lambda name: _inpaint(name, 9),
        "StableDiffusionControlNetPipeline": _control,
        "StableDiffusionControlNetImg2ImgPipeline": _control_image,
        "StableDiffusionControlNetInpaintPipeline": _control_inpaint,
        "StableDiffusionDepth2ImgPipeline": _depth,
        "StableDiffusionAdapterPipeline": _control,
        "StableDiffusionLDM3DPipeline": _text,
        "AltDiffusionPipeline": _text,
        "AltDiffusionImg2ImgPipeline": _image,
        "StableDiffusionInstructPix2PixPipeline": _edit,
        "StableDiffusionUpscalePipeline": _upscale,
        "LatentConsistencyModelPipeline": _text,
        "LatentConsistencyModelImg2ImgPipeline": _image,
    }
)
