"""Qwen-Image. The edit pipelines, and the one that parts layers, append the reference picture's tokens and are a family of their own."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="qwen_image",
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageControlNetPipeline",
        "QwenImageControlNetInpaintPipeline",
    ),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "block",
            ("hidden_states", "encoder_hidden_states", "temb"),
            ("encoder_hidden_states", "hidden_states"),
        ),
    ),
    guidance=Guidance("sequential", ("cond", "uncond"), "true_cfg_scale", requires=("negative_prompt", "negative_prompt_embeds")),
    timestep_scale=1 / 1000,
    conditioning=("encoder_hidden_states", "encoder_hidden_states_mask"),
    prediction="flow",
    latents="packed",
    tiny="diffgraft_pipelines.tiny.qwen_image:make",
)

edit = replace(
    family,
    name="qwen_image_edit",
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline", "QwenImageEditInpaintPipeline", "QwenImageLayeredPipeline"),
    appended="tokens",
    branch_prediction="first_tokens",
)
