"""Stable Diffusion 1.x and 2.x, latent consistency models, InstructPix2Pix, and the upscaler."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="sd",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionAdapterPipeline",
        "AltDiffusionPipeline",
        "AltDiffusionImg2ImgPipeline",
    ),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    sample="sample",
    emptied=("down_intrablock_additional_residuals",),  # an adapter's
    appended="channels",  # inpainting U-Nets with 9 channels: latents, mask, masked picture; of depth to image with 5
    tiny="diffgraft_pipelines.tiny.sd:make",
)

ldm3d = replace(family, name="ldm3d", pipelines=("StableDiffusionLDM3DPipeline",))
"""By itself, for its autoencoder makes a depth map with each picture: plugins that decode or encode do not know it."""

latent_consistency = Family(
    name="latent_consistency",
    pipelines=("LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("none"),  # guidance_scale is an input of the U-Net (timestep_cond), there is one branch
    sample="sample",
    conditioning=("encoder_hidden_states", "timestep_cond"),
    tiny="diffgraft_pipelines.tiny.sd:make",
)

edit = Family(
    name="sd_edit",
    pipelines=("StableDiffusionInstructPix2PixPipeline",),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    # uncond + guidance_scale (cond - image) + image_guidance_scale (image - uncond)
    guidance=Guidance("batched", ("cond", "image", "uncond"), active="do_classifier_free_guidance"),
    sample="sample",
    appended="channels",  # the start picture; none in "uncond"
    tiny="diffgraft_pipelines.tiny.sd:make",
)

upscale = Family(
    name="sd_upscale",
    pipelines=("StableDiffusionUpscalePipeline",),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched"),
    sample="sample",
    conditioning=("encoder_hidden_states", "class_labels"),  # the noise that the small picture got stands for a class
    appended="channels",  # the small picture
    tiny="diffgraft_pipelines.tiny.sd:make",
)
