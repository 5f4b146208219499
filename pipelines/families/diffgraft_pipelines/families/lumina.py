"""Lumina-Next and Lumina 2: text to image."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="lumina2",
    pipelines=("Lumina2Pipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup("context_refiner", "context_refiner", ("hidden_states", "attention_mask"), joined="alone"),
        BlockGroup("noise_refiner", "noise_refiner", ("hidden_states", "temb")),
        BlockGroup("layers", "layer", ("hidden_states", "temb"), joined="mixed"),
    ),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    timestep_scale=-1 / 1000,
    timestep_offset=1.0,
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    prediction="flow",
    turned=True,
    tiny="diffgraft_pipelines.tiny.lumina:make",
)

first = replace(
    family,
    name="lumina",
    pipelines=("LuminaPipeline",),
    blocks=(BlockGroup("layers", "layer", ("hidden_states", "attention_mask", "encoder_hidden_states", "encoder_mask", "temb")),),
    guidance=Guidance("batched", ("cond", "uncond")),  # the pipeline never sets what its property reads
    conditioning=("encoder_hidden_states", "encoder_mask"),
    branch_prediction="drop_sigma",
    common=("image_rotary_emb",),
)
