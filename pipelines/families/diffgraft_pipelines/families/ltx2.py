"""LTX-2: a picture and its sound, denoised together."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

family = Family(
    name="ltx2",
    pipelines=("LTX2Pipeline",),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup(
            "transformer_blocks",
            "block",
            (
                *("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states"),
                *("temb", "temb_audio", "temb_ca_scale_shift", "temb_ca_audio_scale_shift", "temb_ca_gate", "temb_ca_audio_gate"),
                *("temb_prompt", "temb_prompt_audio", "encoder_attention_mask", "audio_encoder_attention_mask"),
            ),
            ("hidden_states", "audio_hidden_states"),
        ),
    ),
    guidance=Guidance(
        "batched",
        active="do_classifier_free_guidance",
        extra=(("uncond_stg", "stg_scale"), ("uncond_modality", "modality_scale")),
    ),
    conditioning=("encoder_hidden_states", "audio_encoder_hidden_states", "encoder_attention_mask", "audio_encoder_attention_mask"),
    prediction="flow",
    companion="audio_hidden_states",
    companion_scale="audio_guidance_scale",
    latents="packed",
    tiny="diffgraft_pipelines.tiny.ltx2:make",
)

image = replace(
    family,
    name="ltx2_image",
    pipelines=("LTX2ImageToVideoPipeline",),
    latents="bcfhw",
    branch_prediction="unpacked_tail",
)
