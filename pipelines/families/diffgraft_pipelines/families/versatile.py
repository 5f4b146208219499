"""Versatile Diffusion: by a text, by a picture."""

from __future__ import annotations

from dataclasses import replace

from diffgraft_pipelines.families import sd_older

family = replace(
    sd_older.family,
    name="versatile",
    pipelines=("VersatileDiffusionTextToImagePipeline", "VersatileDiffusionImageVariationPipeline"),
    denoisers=("image_unet",),
    appended="none",
    tiny="diffgraft_pipelines.tiny.versatile:make",
)
