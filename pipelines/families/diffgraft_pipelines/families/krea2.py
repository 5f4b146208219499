"""Krea 2: text to image."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="krea2",
    pipelines=("Krea2Pipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", ("hidden_states", "temb", "attention_mask"), joined="front"),),
    guidance=Guidance("sequential", ("cond", "uncond"), over="cond", active="do_classifier_free_guidance"),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    prediction="flow",
    latents="packed",
    common=("position_ids",),
    tiny="diffgraft_pipelines.tiny.krea2:make",
)
