"""Stable Diffusion XL."""

from __future__ import annotations

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="sdxl",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    sample="sample",
    conditioning=("encoder_hidden_states", "added_cond_kwargs"),
    appended="channels",  # inpainting U-Nets with 9 channels: latents, mask, masked picture
    tiny="diffgraft_pipelines.tiny.sdxl:make",
)
