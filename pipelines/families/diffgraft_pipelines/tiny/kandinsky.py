"""Tiny Kandinsky pipelines: two levels, the inner one with attention; the variance is learned, as Kandinsky's is."""

from __future__ import annotations

import diffusers
import torch
from diffgraft import Tiny
from diffusers import DDPMScheduler, UNet2DConditionModel, VQModel
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import sd

WIDTH = 32


def _unet(channels: int, addition: str, projection: str) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        addition_embed_type=addition,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type=projection,
        cross_attention_dim=WIDTH,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    )


def _movq() -> VQModel:
    """Eight pixels to a latent."""
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        block_out_channels=(32,) * 4,  # its norms have 32 groups
        latent_channels=4,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )


def _finish(name: str, unet: UNet2DConditionModel, parts: dict[str, object], **kwargs: object) -> Tiny:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample_range=2.0)
    pipe = getattr(diffusers, name)(unet=c.narrow(unet), scheduler=scheduler, movq=_movq(), **parts)
    embeds = {f"{which}image_embeds": torch.randn(1, WIDTH) for which in ("", "negative_")}
    return c.finish(pipe, guidance_scale=4.0, height=c.SIDE, width=c.SIDE, **embeds, **kwargs)


def _pipeline(name: str, channels: int = 4, **kwargs: object) -> Tiny:
    return _finish(name, _unet(channels, "image", "image_proj"), {}, **kwargs)


def _control(name: str, **kwargs: object) -> Tiny:
    """The picture to go by joins the latents inside the U-Net."""
    return _finish(name, _unet(8, "image_hint", "image_proj"), {}, hint=torch.rand(1, 3, c.SIDE, c.SIDE), **kwargs)


def _first(name: str, channels: int = 4, **kwargs: object) -> Tiny:
    tokenizer = sd._tongues()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    widths = {"transformerDimSize": WIDTH, "imageDimSize": WIDTH}
    config = MCLIPConfig(vocab_size=len(tokenizer), pad_token_id=1, max_position_embeddings=80, **widths, **sizes)
    parts = {"tokenizer": tokenizer, "text_encoder": MultilingualCLIP(config)}
    unet = _unet(channels, "text_image", "text_image_proj")
    return _finish(name, unet, parts, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, **kwargs)


START = {"image": c.picture(), "strength": 0.8}
PAINT = {"image": c.picture(), "mask_image": c.mask()}
make = c.maker(
    {
        "KandinskyV22Pipeline": _pipeline,
        "KandinskyV22Img2ImgPipeline": lambda name: _pipeline(name, **START),
        "KandinskyV22InpaintPipeline": lambda name: _pipeline(name, 9, **PAINT),
        "KandinskyV22ControlnetPipeline": _control,
        "KandinskyV22ControlnetImg2ImgPipeline": lambda name: _control(name, **START),
        "KandinskyPipeline": _first,
        "KandinskyImg2ImgPipeline": lambda name: _first(name, **START),
        "KandinskyInpaintPipeline": lambda name: _first(name, 9, **PAINT),
    }
)
