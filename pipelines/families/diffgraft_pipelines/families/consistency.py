"""Consistency models on pixels, with or without classes: one to a few steps, each with new noise."""

from __future__ import annotations

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="consistency",
    pipelines=("ConsistencyModelPipeline",),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions", text=False),
    guidance=Guidance("none"),
    sample="sample",
    conditioning=("class_labels",),
    prediction="consistency",
    latents="pixels",
    tiny="diffgraft_pipelines.tiny.pixel:make",
)
