"""Older pipelines on the U-Net of Stable Diffusion, which say by no property whether guidance is on."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Guidance

from diffgraft_pipelines.families import sd

family = replace(
    sd.family,
    name="sd_older",
    pipelines=(
        "StableDiffusionModelEditingPipeline",
        "StableDiffusionInpaintPipelineLegacy",
        "StableDiffusionImageVariationPipeline",  # by a picture instead of a text
        "StableDiffusionDiffEditPipeline",
        "PaintByExamplePipeline",  # the same; mask and masked picture are appended
    ),
    guidance=Guidance("batched"),
    tiny="diffgraft_pipelines.tiny.sd_older:make",
)

unclip = replace(
    family,
    name="stable_unclip",
    pipelines=("StableUnCLIPPipeline", "StableUnCLIPImg2ImgPipeline"),
    conditioning=("encoder_hidden_states", "class_labels"),  # the embedding of a picture
    appended="none",
)

gligen = replace(
    family,
    name="gligen",
    pipelines=("StableDiffusionGLIGENPipeline",),
    conditioning=("encoder_hidden_states", "cross_attention_kwargs"),  # phrases and their boxes
)
