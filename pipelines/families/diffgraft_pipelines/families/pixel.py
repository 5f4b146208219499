"""Unconditional U-Nets on pixels."""

from __future__ import annotations

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="pixel",
    pipelines=("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions", text=False),
    guidance=Guidance("none"),
    sample="sample",
    conditioning=(),
    latents="pixels",
    unit_start=True,
    tiny="diffgraft_pipelines.tiny.pixel:make",
)
