"""Kandinsky 2.1 and 2.2: by the embedding of a picture, which a prior makes of a text, in 2.1 by the text too; img2img, inpainting.

Their U-Nets tell a variance beside the noise; the scheduler that Kandinsky ships with takes it.
"""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Family, Guidance

from diffgraft_pipelines.families._unet import unet_blocks

family = Family(
    name="kandinsky_v22",
    pipelines=("KandinskyV22Pipeline", "KandinskyV22Img2ImgPipeline", "KandinskyV22InpaintPipeline"),
    denoisers=("unet",),
    kind="unet",
    blocks=unet_blocks("resnets", "attentions"),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    sample="sample",
    conditioning=("added_cond_kwargs",),
    appended="channels",  # inpainting: masked picture, mask
    branch_prediction="drop_sigma",
    tiny="diffgraft_pipelines.tiny.kandinsky:make",
)

control = replace(
    family,
    name="kandinsky_v22_control",
    pipelines=("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline"),  # the picture to go by is a condition (hint)
    guidance=Guidance("batched"),
    appended="none",
)

first = replace(
    family,
    name="kandinsky",
    pipelines=("KandinskyPipeline", "KandinskyImg2ImgPipeline", "KandinskyInpaintPipeline"),
    guidance=Guidance("batched"),
    conditioning=("encoder_hidden_states", "added_cond_kwargs"),
)
