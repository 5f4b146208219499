"""Tiny LTX-2 pipelines: picture and sound, two blocks, nine frames (three of the latents)."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS = 4
MELS, SOUND = 8, 2
SIDE = 32
LAYERS = 2


def _text(vocabulary: int) -> Gemma3ForConditionalGeneration:
    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    picture = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=picture, mm_tokens_per_image=4, image_token_index=3)
    return Gemma3ForConditionalGeneration(config)


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    transformer = small(
        "LTX2VideoTransformer3DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        vae_scale_factors=(4, 4, 4),
        audio_in_channels=MELS // 4 * SOUND,
        audio_out_channels=MELS // 4 * SOUND,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        rope_double_precision=False,
        perturbed_attn=True,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
    )
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=LAYERS + 1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=16,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=16,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
    )
    vae = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("spatiotemporal", "spatiotemporal"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        patch_size=1,
    )
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=SOUND,
        mid_block_add_attention=False,
        mel_bins=MELS,
    )
    vocoder = LTX2Vocoder(
        in_channels=2 * MELS,
        hidden_channels=8,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3]],
        output_sampling_rate=16000,
    )
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=_text(len(tokenizer)),
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=3.0,
        audio_guidance_scale=None,
        stg_scale=0.0,
        audio_stg_scale=None,
        modality_scale=1.0,
        audio_modality_scale=None,
        guidance_rescale=0.0,
        audio_guidance_rescale=None,
        height=SIDE,
        width=SIDE,
        num_frames=9,
        max_sequence_length=32,
        **kwargs,
    )


make = c.maker(
    {
        "LTX2Pipeline": _pipeline,
        "LTX2ImageToVideoPipeline": lambda name: _pipeline(name, image=c.picture(SIDE), image_crf=0),
    }
)
