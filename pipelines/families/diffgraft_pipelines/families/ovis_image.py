"""Ovis-Image: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="ovis_image",
    pipelines=("OvisImagePipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "double",
            ("hidden_states", "encoder_hidden_states", "temb"),
            ("encoder_hidden_states", "hidden_states"),
        ),
        BlockGroup(
            "single_transformer_blocks",
            "single",
            ("hidden_states", "encoder_hidden_states", "temb"),
            ("encoder_hidden_states", "hidden_states"),
        ),
    ),
    guidance=Guidance("sequential", ("cond", "uncond")),
    timestep_scale=1 / 1000,
    prediction="flow",
    latents="packed",
    common=("txt_ids", "img_ids"),
    tiny="diffgraft_pipelines.tiny.ovis_image:make",
)
