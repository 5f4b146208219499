"""Stable Diffusion XL, and InstructPix2Pix on it."""

from __future__ import annotations

from dataclasses import replace

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
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
    ),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    sample="sample",
    conditioning=("encoder_hidden_states", "added_cond_kwargs"),
    emptied=("down_intrablock_additional_residuals",),  # an adapter's
    appended="channels",  # inpainting U-Nets with 9 channels: latents, mask, masked picture
    tiny="diffgraft_pipelines.tiny.sdxl:make",
)

modular = replace(
    family, name="sdxl_modular", pipelines=("StableDiffusionXLModularPipeline",), guidance=Guidance("sequential", ("cond", "uncond"))
)

edit = Family(
    name="sdxl_edit",
    pipelines=("StableDiffusionXLInstructPix2PixPipeline",),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    # uncond + guidance_scale (cond - image) + image_guidance_scale (image - uncond); the pipeline has no property that says so
    guidance=Guidance("batched", ("cond", "image", "uncond"), least=(("image_guidance_scale", 1.0),)),
    sample="sample",
    conditioning=("encoder_hidden_states", "added_cond_kwargs"),
    appended="channels",  # the start picture; none in "uncond"
    tiny="diffgraft_pipelines.tiny.sdxl:make",
)
