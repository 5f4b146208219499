"""AnimateDiff: Stable Diffusion with motion modules."""

from __future__ import annotations

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="animatediff",
    pipelines=("AnimateDiffPipeline", "AnimateDiffVideoToVideoPipeline", "AnimateDiffControlNetPipeline"),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions", "motion_modules"),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    sample="sample",
    latents="bcfhw",
    one_each=True,
    tiny="diffgraft_pipelines.tiny.animatediff:make",
)
