"""Tiny Stable Video Diffusion: three frames (its layers normalise in 32 groups, hence 32 channels)."""

from __future__ import annotations

from diffgraft import Tiny
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)

from diffgraft_pipelines.tiny import _common as c

FRAMES = 3
SIDE = 32


def _pipeline(_name: str) -> Tiny:
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        down_block_types=(
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 2, 4),
        cross_attention_dim=32,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=3 * 8,
        num_frames=FRAMES,
    )
    vae = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
        steps_offset=1,
    )
    pipe = StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=c.clip_vision(224),
        unet=unet,
        scheduler=scheduler,
        feature_extractor=c.clip_image_processor(224),
    )
    return c.finish(pipe, image=c.picture(SIDE), height=SIDE, width=SIDE, num_frames=FRAMES, max_guidance_scale=3.0, fps=7)


make = c.maker({"StableVideoDiffusionPipeline": _pipeline})
