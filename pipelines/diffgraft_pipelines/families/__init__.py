"""One file per pipeline family: data only, no torch and no diffusers."""

from __future__ import annotations

from diffgraft_pipelines.families import flux, pixart, sd, sdxl, wan

FAMILIES = (
    sd.family,
    sd.latent_consistency,
    sdxl.family,
    flux.family,
    flux.kontext,
    flux.fill,
    pixart.family,
    wan.family,
)
