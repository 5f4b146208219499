"""Allegro: text to video."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="allegro",
    pipelines=("AllegroPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "block",
            ("hidden_states", "encoder_hidden_states", "temb", "encoder_attention_mask"),
        ),
    ),
    guidance=Guidance("batched"),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    latents="bcfhw",
    common=("image_rotary_emb",),
    one_each=True,
    tiny="diffgraft_pipelines.tiny.allegro:make",
)
