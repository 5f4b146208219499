"""Chroma: text to image, image to image. (Inpainting asks its transformer for a setting that it does not have, and cannot run in 0.42.)"""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="chroma",
    pipelines=("ChromaPipeline", "ChromaImg2ImgPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "double",
            ("hidden_states", "encoder_hidden_states", "temb", "attention_mask"),
            ("encoder_hidden_states", "hidden_states"),
        ),
        BlockGroup("single_transformer_blocks", "single", ("hidden_states", "temb", "attention_mask"), joined="front"),
    ),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states", "attention_mask"),
    prediction="flow",
    latents="packed",
    common=("img_ids", "txt_ids"),
    tiny="diffgraft_pipelines.tiny.chroma:make",
)
