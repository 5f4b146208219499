"""Flux.1: text to image, image to image, inpainting; Kontext, Fill and Control differ in facts and are families of their own."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

TAKES = ("hidden_states", "encoder_hidden_states", "temb")
RETURNS = ("encoder_hidden_states", "hidden_states")

family = Family(
    name="flux",
    pipelines=("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxControlNetPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup("transformer_blocks", "double", TAKES, RETURNS),
        BlockGroup("single_transformer_blocks", "single", TAKES, RETURNS),
    ),
    guidance=Guidance("sequential", ("cond", "uncond"), "true_cfg_scale", requires=("negative_prompt", "negative_prompt_embeds")),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states", "pooled_projections", "guidance"),
    prediction="flow",
    latents="packed",
    common=("img_ids", "txt_ids"),
    tiny="diffgraft_pipelines.tiny.flux:make",
)

modular = replace(family, name="flux_modular", pipelines=("FluxModularPipeline",))
"""Of its own: plugins that call methods of the standard pipeline find none here, so they say that they know it."""

kontext = replace(
    family,
    name="flux_kontext",
    pipelines=("FluxKontextPipeline", "FluxKontextInpaintPipeline"),
    appended="tokens",
    branch_prediction="first_tokens",
)

fill = replace(
    family,
    name="flux_fill",
    pipelines=("FluxFillPipeline", "VisualClozeGenerationPipeline"),
    guidance=Guidance("none"),
    appended="channels",
)

control = replace(
    fill,  # the control picture's channels; with a ControlNet none
    name="flux_control",
    pipelines=(
        "FluxControlPipeline",
        "FluxControlImg2ImgPipeline",
        "FluxControlInpaintPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
)
