"""Sana: text to image, with ControlNet, text to video. (Sprint and image to video: see ``refused``.)"""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="sana",
    pipelines=("SanaPipeline", "SanaControlNetPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", ("hidden_states", "encoder_hidden_states", "encoder_attention_mask", "timestep")),),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    conditioning=("encoder_hidden_states", "encoder_attention_mask"),
    prediction="flow",
    tiny="diffgraft_pipelines.tiny.sana:make",
)

video = replace(family, name="sana_video", pipelines=("SanaVideoPipeline",), latents="bcfhw")
