"""PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="pixart",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "block",
            ("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep"),
            layers=("attn1", "attn2", "ff"),
        ),
    ),
    guidance=Guidance("batched"),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    branch_prediction="drop_sigma",
    tiny="diffgraft_pipelines.tiny.pixart:make",
)
