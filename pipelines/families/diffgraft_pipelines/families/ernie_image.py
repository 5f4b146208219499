"""ERNIE-Image: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="ernie_image",
    pipelines=("ErnieImagePipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("layers", "layer", ("x", "attention_mask"), ("x",), joined="behind", rows=1),),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    conditioning=("text_bth", "text_lens"),
    prediction="flow",
    tiny="diffgraft_pipelines.tiny.ernie_image:make",
)
