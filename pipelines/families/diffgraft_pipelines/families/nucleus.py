"""Nucleus-MoE-Image: text to image; the guided prediction gets the length of the conditional one."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="nucleus_moe",
    pipelines=("NucleusMoEImagePipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", ("hidden_states", "encoder_hidden_states", "temb")),),
    guidance=Guidance("sequential", ("cond", "uncond")),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states", "encoder_hidden_states_mask"),
    prediction="flow",
    turned=True,
    latents="packed",
    tiny="diffgraft_pipelines.tiny.nucleus:make",
)
