"""PRX: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="prx",
    pipelines=("PRXPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("blocks", "block", ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")),),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states", "attention_mask"),
    prediction="flow",
    packages={"ftfy": ("PRXPipeline",)},
    tiny="diffgraft_pipelines.tiny.prx:make",
)
