"""AuraFlow: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="auraflow",
    pipelines=("AuraFlowPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "joint_transformer_blocks",
            "joint",
            ("hidden_states", "encoder_hidden_states", "temb"),
            ("encoder_hidden_states", "hidden_states"),
        ),
        BlockGroup("single_transformer_blocks", "single", ("hidden_states", "temb"), joined="front"),
    ),
    guidance=Guidance("batched"),
    timestep_scale=1 / 1000,
    prediction="flow",
    tiny="diffgraft_pipelines.tiny.auraflow:make",
)
