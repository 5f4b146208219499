"""Tiny Qwen-Image pipelines: three blocks and a small Qwen2.5-VL text encoder."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffgraft_pipelines.tiny import _common as c

CHANNELS = 4
SYSTEM = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships"
)
SYSTEM += " of the objects and background:\nuser\nassistant\n"


def tokenizer() -> Qwen2Tokenizer:
    """Bytes, and the words of the pipeline's system prompt: it must have as many tokens as the pipeline cuts off."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    result = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(special)}, merges=[])
    trainer = BpeTrainer(
        vocab_size=2000,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    result.backend_tokenizer.train_from_iterator([SYSTEM], trainer)
    return result


def text_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    """Two language layers and one vision layer."""
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _pipeline(name: str, **kwargs: object) -> Tiny:
    words = tokenizer()
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer,
    )
    return c.finish(
        pipe,
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        true_cfg_scale=4.0,
        height=c.SIDE,
        width=c.SIDE,
        max_sequence_length=32,
        **kwargs,
    )


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8)


make = c.maker(
    {
        "QwenImagePipeline": _pipeline,
        "QwenImageImg2ImgPipeline": _image,
        "QwenImageInpaintPipeline": _inpaint,
    }
)
