"""AnimateDiff: Stable Diffusion with motion modules; the same on SDXL; PIA, which moves a picture."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="animatediff",
    pipelines=(
        "AnimateDiffPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "AnimateDiffControlNetPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "AnimateDiffSparseControlNetPipeline",
        "PIAPipeline",
    ),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions", "motion_modules"),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    sample="sample",
    latents="bcfhw",
    appended="channels",  # PIA: how far each frame may go from the picture, and the picture
    one_each=True,
    tiny="diffgraft_pipelines.tiny.animatediff:make",
)

xl = replace(
    family,
    name="animatediff_xl",
    pipelines=("AnimateDiffSDXLPipeline",),
    conditioning=("encoder_hidden_states", "added_cond_kwargs"),
    appended="none",
)
