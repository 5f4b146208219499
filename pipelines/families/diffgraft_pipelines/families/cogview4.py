"""CogView4: text to image, and with a control picture behind the sample's channels."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TENSORS = ("hidden_states", "encoder_hidden_states")

family = Family(
    name="cogview4",
    pipelines=("CogView4Pipeline", "CogView4ControlPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", (*TENSORS, "temb"), TENSORS),),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    prediction="flow",
    appended="channels",  # of a control picture
    tiny="diffgraft_pipelines.tiny.cogview4:make",
)
