"""The first latent diffusion models: by a text, and of a small picture a large one."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Guidance

from diffgraft_pipelines.families import pixel, sd

family = replace(
    sd.family,
    name="latent_diffusion",
    pipelines=("LDMTextToImagePipeline",),
    guidance=Guidance("batched"),
    appended="none",
    unit_start=True,
    tiny="diffgraft_pipelines.tiny.latent:make",
)

upscale = replace(
    pixel.family,
    name="latent_upscale",
    pipelines=("LDMSuperResolutionPipeline",),
    latents="bchw",
    appended="channels",  # the small picture
    unit_start=False,
    tiny="diffgraft_pipelines.tiny.latent:make",
)
