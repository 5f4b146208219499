"""Anima: text to image, and image to image, on Cosmos' transformer; there are modular pipelines of it only."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="anima",
    pipelines=("AnimaModularPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", ("hidden_states", "encoder_hidden_states", "embedded_timestep", "temb")),),
    guidance=Guidance("sequential", ("cond", "uncond")),
    timestep_scale=1 / 1000,
    prediction="flow",
    latents="bcfhw",
    common=("padding_mask",),
    tiny="diffgraft_pipelines.tiny.anima:make",
)
