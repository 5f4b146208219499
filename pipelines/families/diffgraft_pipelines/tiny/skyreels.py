"""Tiny SkyReels-V2 diffusion forcing pipelines: three latent frames, all at one time (``ar_step`` 0)."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLWan, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from transformers import UMT5Config, UMT5EncoderModel

from diffgraft_pipelines.tiny import _common as c

SIDE = 32
CHANNELS = 8
FRAMES = 9


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=64,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=8.0)
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(UMT5Config(**c.t5_config(tokenizer))),
        transformer=transformer,
        vae=vae,
        scheduler=scheduler,
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=5.0,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        max_sequence_length=32,
        **kwargs,
    )


make = c.maker(
    {
        "SkyReelsV2DiffusionForcingPipeline": _pipeline,
        "SkyReelsV2DiffusionForcingImageToVideoPipeline": lambda name: _pipeline(name, image=c.picture(SIDE)),
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline": lambda name: _pipeline(
            name,
            video=c.video(5, SIDE),
            overlap_history=5,  # diffusers fails without it
        ),
    }
)
