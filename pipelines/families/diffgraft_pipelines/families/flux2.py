"""FLUX.2 Klein: text to image, with pictures to go by, and inpainting; FLUX.2 dev, which has the guidance scale for an input."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

klein = Family(
    name="flux2_klein",
    pipelines=("Flux2KleinPipeline", "Flux2KleinInpaintPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "double",
            ("hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt"),
            ("encoder_hidden_states", "hidden_states"),
        ),
        BlockGroup("single_transformer_blocks", "single", ("hidden_states", "temb_mod"), joined="front"),
    ),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states",),
    prediction="flow",
    latents="packed",
    appended="tokens",  # of pictures to go by
    branch_prediction="first_tokens",
    tiny="diffgraft_pipelines.tiny.flux2:make",
)

dev = replace(
    klein,
    name="flux2",
    pipelines=("Flux2Pipeline",),
    guidance=Guidance("none"),
    conditioning=("encoder_hidden_states", "guidance"),
)
