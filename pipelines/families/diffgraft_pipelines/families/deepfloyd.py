"""DeepFloyd IF: text, img2img and inpainting on pixels, and the second stage of each, which enlarges a small picture.

Its U-Nets tell a variance beside the noise; the scheduler that IF ships with takes it.
"""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="deepfloyd_if",
    pipelines=("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched"),
    sample="sample",
    latents="pixels",
    branch_prediction="drop_sigma",
    tiny="diffgraft_pipelines.tiny.deepfloyd:make",
)

upscale = replace(
    family,
    name="deepfloyd_if_upscale",
    pipelines=("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
    conditioning=("encoder_hidden_states", "class_labels"),  # the noise that the small picture got stands for a class
    appended="channels",  # the small picture, enlarged
)
