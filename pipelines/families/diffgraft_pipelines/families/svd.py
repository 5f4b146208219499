"""Stable Video Diffusion: guidance grows from ``min_guidance_scale`` to ``max_guidance_scale`` over the frames."""

from __future__ import annotations

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="svd",
    pipelines=("StableVideoDiffusionPipeline",),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched", scale="max_guidance_scale", active="do_classifier_free_guidance"),
    sample="sample",
    conditioning=("encoder_hidden_states", "added_time_ids"),
    latents="bfchw",
    appended="channels",
    tiny="diffgraft_pipelines.tiny.svd:make",
)
