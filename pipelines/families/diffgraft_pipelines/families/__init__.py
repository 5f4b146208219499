"""One file per pipeline family: data only, no torch and no diffusers."""

from __future__ import annotations

from diffgraft_pipelines.families import (
    animatediff,
    chroma,
    cogvideox,
    consistency,
    dit,
    flux,
    ltx,
    pixart,
    pixel,
    qwen_image,
    sd,
    sd3,
    sdxl,
    skyreels,
    svd,
    wan,
)

FAMILIES = (
    sd.family,
    sd.latent_consistency,
    sd.edit,
    sd.upscale,
    animatediff.family,
    sdxl.family,
    sdxl.edit,
    svd.family,
    pixel.family,
    consistency.family,
    dit.family,
    pixart.family,
    sd3.family,
    flux.family,
    flux.kontext,
    flux.fill,
    chroma.family,
    qwen_image.family,
    qwen_image.edit,
    wan.family,
    skyreels.family,
    ltx.family,
    ltx.image,
    cogvideox.family,
)
