"""LongCat-Image: text to image, which brings the guided prediction to the length of the conditional one (`enable_cfg_renorm`); editing."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Guidance

from diffgraft_pipelines.families import ovis_image

family = replace(
    ovis_image.family,
    name="longcat_image",
    pipelines=("LongCatImagePipeline",),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    tiny="diffgraft_pipelines.tiny.longcat_image:make",
)

edit = replace(
    family,
    name="longcat_image_edit",
    pipelines=("LongCatImageEditPipeline",),
    appended="tokens",
    branch_prediction="first_tokens",
)
