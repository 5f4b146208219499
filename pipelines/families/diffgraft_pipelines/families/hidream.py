"""HiDream: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TENSORS = ("hidden_states", "encoder_hidden_states")

family = Family(
    name="hidream",
    pipelines=("HiDreamImagePipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(  # each is given the text of a layer of its own besides, which is cut off again
        BlockGroup("double_stream_blocks", "double_stream", (*TENSORS, "temb"), TENSORS),
        BlockGroup("single_stream_blocks", "single_stream", ("hidden_states", "temb"), joined="behind"),
    ),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    timestep="timesteps",
    conditioning=("encoder_hidden_states_t5", "encoder_hidden_states_llama3", "pooled_embeds"),
    prediction="flow",
    turned=True,
    layered=("encoder_hidden_states_llama3",),
    tiny="diffgraft_pipelines.tiny.hidream:make",
)
