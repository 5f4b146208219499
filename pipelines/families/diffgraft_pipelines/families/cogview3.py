"""CogView3 plus: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TENSORS = ("hidden_states", "encoder_hidden_states")

family = Family(
    name="cogview3",
    pipelines=("CogView3PlusPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", (*TENSORS, "emb"), TENSORS),),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    tiny="diffgraft_pipelines.tiny.cogview3:make",
)
