"""Hunyuan-DiT: text to image, with ControlNet. A block of the second half also takes what one of the first half gave (``skip``)."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="hunyuan_dit",
    pipelines=("HunyuanDiTPipeline", "HunyuanDiTControlNetPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("blocks", "block", ("hidden_states", "encoder_hidden_states", "temb", "skip")),),
    guidance=Guidance("batched", active="do_classifier_free_guidance"),
    conditioning=("encoder_hidden_states", "text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5"),
    emptied=("controlnet_block_samples",),
    branch_prediction="drop_sigma",
    common=("image_rotary_emb",),
    tiny="diffgraft_pipelines.tiny.hunyuan_dit:make",
)
