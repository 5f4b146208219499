"""One file per pipeline family: data only, no torch and no diffusers."""

from __future__ import annotations

from diffgraft_pipelines.families import (
    animatediff,
    cogvideox,
    dit,
    flux,
    ltx,
    pixart,
    pixel,
    qwen_image,
    sd,
    sd3,
    sdxl,
    svd,
    wan,
)

FAMILIES = (
    sd.family,
    sd.latent_consistency,
    animatediff.family,
    sdxl.family,
    svd.family,
    pixel.family,
    dit.family,
    pixart.family,
    sd3.family,
    flux.family,
    flux.kontext,
    flux.fill,
    qwen_image.family,
    qwen_image.edit,
    wan.family,
    ltx.family,
    ltx.image,
    cogvideox.family,
)
