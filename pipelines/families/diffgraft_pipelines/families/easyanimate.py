"""EasyAnimate: text to video, inpainting; mask and masked video are an input of the transformer of their own."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TENSORS = ("hidden_states", "encoder_hidden_states")

family = Family(
    name="easyanimate",
    pipelines=("EasyAnimatePipeline", "EasyAnimateInpaintPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", (*TENSORS, "temb"), TENSORS),),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    prediction="flow",
    latents="bcfhw",
    tiny="diffgraft_pipelines.tiny.easyanimate:make",
)
