"""Tiny DeepFloyd IF pipelines on 16 pixels: two levels, the inner one with attention; the variance is learned, as IF's is."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import DDPMScheduler, UNet2DConditionModel

from diffgraft_pipelines.tiny import _common as c

SIDE = 16


def _unet(channels: int) -> UNet2DConditionModel:
    second = {"class_embed_type": "timestep", "mid_block_scale_factor": 1.414} if channels == 6 else {}
    return UNet2DConditionModel(
        sample_size=SIDE,
        in_channels=channels,
        out_channels=6,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        cross_attention_dim=32,
        encoder_hid_dim=32,
        attention_head_dim=8,
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        act_fn="gelu",
        norm_num_groups=8,
        **second,
    )


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    second = "SuperResolution" in name
    thresholds = {"thresholding": True, "dynamic_thresholding_ratio": 0.95, "sample_max_value": 1.5}
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.t5_text(tokenizer),
        unet=c.narrow(_unet(6 if second else 3)),
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", **thresholds),
        **({"image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2")} if second else {}),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    texts = {"prompt": c.PROMPT, "negative_prompt": c.NEGATIVE, "clean_caption": False}
    return c.finish(pipe, guidance_scale=4.0, **texts, **kwargs)


START = {"strength": 0.8}
SMALL = {"image": c.picture(SIDE // 2, 1), "noise_level": 20}
make = c.maker(
    {
        "IFPipeline": lambda name: _pipeline(name, height=SIDE, width=SIDE),
        "IFImg2ImgPipeline": lambda name: _pipeline(name, image=c.picture(SIDE), **START),
        "IFInpaintingPipeline": lambda name: _pipeline(name, image=c.picture(SIDE), mask_image=c.mask(SIDE), **START),
        "IFSuperResolutionPipeline": lambda name: _pipeline(name, height=SIDE, width=SIDE, **SMALL),
        "IFImg2ImgSuperResolutionPipeline": lambda name: _pipeline(name, original_image=c.picture(SIDE), **START, **SMALL),
        "IFInpaintingSuperResolutionPipeline": lambda name: _pipeline(
            name, original_image=c.picture(SIDE), mask_image=c.mask(SIDE), **START, **SMALL
        ),
    }
)
