"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="sd3",
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(  # the last block returns None for encoder_hidden_states
            "transformer_blocks",
            "block",
            ("hidden_states", "encoder_hidden_states", "temb"),
            ("encoder_hidden_states", "hidden_states"),
        ),
    ),
    guidance=Guidance("batched", active="do_classifier_free_guidance", extra=(("skip", "skip_guidance_layers"),)),
    conditioning=("encoder_hidden_states", "pooled_projections"),
    prediction="flow",
    appended="channels",  # inpainting transformers with 33 channels: latents, mask, masked picture
    tiny="diffgraft_pipelines.tiny.sd3:make",
)
