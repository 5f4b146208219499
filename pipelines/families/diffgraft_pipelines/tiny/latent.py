"""Tiny pipelines of the first latent diffusion models: by a text, and of a small picture a large one."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import DDIMScheduler, UNet2DModel, VQModel
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import sd


def _text(name: str) -> Tiny:
    tokenizer = c.clip_tokenizer()
    sizes = {"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 4, "head_dim": 8, "d_model": 32}
    bert = LDMBertModel(LDMBertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))
    pipe = getattr(diffusers, name)(vqvae=c.vae(), bert=bert, tokenizer=tokenizer, unet=sd.unet(), scheduler=sd.ddim())
    return c.finish(pipe, prompt=c.PROMPT, guidance_scale=5.0, height=c.SIDE, width=c.SIDE)


def _upscale(name: str) -> Tiny:
    unet = UNet2DModel(
        sample_size=16,
        in_channels=6,
        out_channels=3,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vqvae = VQModel(block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=16, **levels)
    pipe = getattr(diffusers, name)(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler(clip_sample=False))
    return c.finish(pipe, image=c.picture(32))


make = c.maker({"LDMTextToImagePipeline": _text, "LDMSuperResolutionPipeline": _upscale})
