"""LTX-Video.

Image to video gives the denoiser the tokens of all frames, but steps the scheduler on unpacked latents without the
first frame.
"""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="ltx",
    pipelines=("LTXPipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "block",
            ("hidden_states", "encoder_hidden_states", "temb", "encoder_attention_mask"),
        ),
    ),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    prediction="flow",
    latents="packed",
    tiny="diffgraft_pipelines.tiny.ltx:make",
)

image = replace(
    family,
    name="ltx_image",
    pipelines=("LTXImageToVideoPipeline",),
    latents="bcfhw",
    branch_prediction="unpacked_tail",
)
