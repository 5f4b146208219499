"""Wan 2.1 and 2.2: text to video, image to video; 2.2 has a second transformer for the low-noise steps."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="wan",
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    denoisers=("transformer", "transformer_2"),
    kind="dit",
    blocks=(BlockGroup("blocks", "block", ("hidden_states", "encoder_hidden_states", "temb")),),
    guidance=Guidance(
        "sequential", ("cond", "uncond"), active="do_classifier_free_guidance", second_scale="guidance_scale_2"
    ),
    conditioning=("encoder_hidden_states", "encoder_hidden_states_image"),
    prediction="flow",
    latents="bcfhw",
    appended="channels",  # image to video: mask and start picture
    packages={"ftfy": ("WanImageToVideoPipeline", "WanVideoToVideoPipeline")},  # text to video does without
    tiny="diffgraft_pipelines.tiny.wan:make",
)
