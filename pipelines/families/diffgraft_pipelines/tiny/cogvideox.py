"""Tiny CogVideoX pipelines: three blocks, nine frames; added positions (2B) for text to video, else rotary (5B)."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
)

from diffgraft_pipelines.tiny import _common as c

CHANNELS = 4
SIDE = 32
FRAMES = 9
TOKENS = 32


def _pipeline(name: str, in_channels: int = CHANNELS, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    rotary = name != "CogVideoXPipeline"
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=CHANNELS,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=3,
        sample_width=SIDE // 8,
        sample_height=SIDE // 8,
        sample_frames=FRAMES,
        max_text_seq_length=TOKENS,
        use_rotary_positional_embeddings=rotary,
    )
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), latent_channels=CHANNELS, layers_per_block=1, norm_num_groups=4)
    schedule = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 3.0,
        "timestep_spacing": "trailing",
    }
    scheduler = CogVideoXDPMScheduler if rotary and "Fun" not in name else CogVideoXDDIMScheduler
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=c.t5_text(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler(**schedule),
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=6.0,
        height=SIDE,
        width=SIDE,
        max_sequence_length=TOKENS,
        **kwargs,
    )


def _text(name: str) -> Tiny:
    return _pipeline(name, num_frames=FRAMES)


def _image(name: str) -> Tiny:
    return _pipeline(name, 2 * CHANNELS, num_frames=FRAMES, image=c.picture(SIDE))


def _video(name: str) -> Tiny:
    return _pipeline(name, video=c.video(FRAMES, SIDE), strength=0.8)


def _control(name: str) -> Tiny:
    return _pipeline(name, 2 * CHANNELS, control_video=c.video(FRAMES, SIDE))


make = c.maker(
    {
        "CogVideoXPipeline": _text,
        "CogVideoXImageToVideoPipeline": _image,
        "CogVideoXVideoToVideoPipeline": _video,
        "CogVideoXFunControlPipeline": _control,
    }
)
