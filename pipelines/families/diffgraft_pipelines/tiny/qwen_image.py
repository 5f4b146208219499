"""Tiny Qwen-Image pipelines: three blocks and a small Qwen2.5-VL text encoder."""

from __future__ import annotations

from typing import Any

import diffusers
from diffgraft import Tiny
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffgraft_pipelines.tiny import _common as c

CHANNELS = 4
SYSTEM = "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships"
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


SIZES = {
    "patch_size": 2,
    "in_channels": 4 * CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (8, 4, 4),
}


def _vae(name: str) -> AutoencoderKLQwenImage:
    still = name == "QwenImageControlNetInpaintPipeline"
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[c.MEAN if still else 0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    return c.still(vae) if still else vae


def _pipeline(name: str, **kwargs: object) -> Tiny:
    words = tokenizer()
    transformer = QwenImageTransformer2DModel(**SIZES)
    more = {}
    if "ControlNet" in name:  # of inpainting with the mask behind the picture, four of its pixels to a token
        more["controlnet"] = QwenImageControlNetModel(extra_condition_channels=4 * ("Inpaint" in name), **SIZES)
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
        vae=_vae(name),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=transformer,
        **more,
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


def _control(name: str) -> Tiny:
    return _pipeline(name, control_image=c.picture(seed=1))


def _control_inpaint(name: str) -> Tiny:
    return _pipeline(name, control_image=c.picture(), control_mask=c.mask())


class Smaller(VaeImageProcessor):  # type: ignore[misc]
    """Small pictures, whatever size is asked for: the editing pipelines ask for 1024 pixels a side."""

    def resize(self, image: Any, height: int, width: int, **how: Any) -> Any:
        return super().resize(image, c.SIDE, c.SIDE, **how)


class Words:
    """A processor of texts that leaves the pictures out: they come to the transformer as tokens."""

    def __init__(self, tokenizer: Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any = None, **how: Any) -> Any:
        return self.tokenizer(text, **how)


def _edit(name: str, side: int = 1024, layered: bool = False, **kwargs: object) -> Tiny:
    words = tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True)
    pipe = getattr(diffusers, name)(
        scheduler=scheduler,
        vae=_vae(name),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        processor=Words(words),
        transformer=QwenImageTransformer2DModel(
            **SIZES | {"in_channels": 4 * CHANNELS, "out_channels": CHANNELS},
            use_additional_t_cond=layered,
            use_layer3d_rope=layered,
        ),
    )
    pipe.image_processor = Smaller(vae_scale_factor=2 * pipe.vae_scale_factor)
    if "Inpaint" in name:
        pipe.mask_processor = Smaller(**pipe.mask_processor.config)
    pipe.vae_scale_factor *= side // c.SIDE  # so that a latent stands for as much as it would of the large picture
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}", 0  # the tokenizer would spell the instruction
    texts = {"prompt": c.PROMPT, "negative_prompt": c.NEGATIVE, "max_sequence_length": 32}
    return c.finish(pipe, true_cfg_scale=4.0, image=c.picture(), **texts, **kwargs)


make = c.maker(
    {
        "QwenImagePipeline": _pipeline,
        "QwenImageImg2ImgPipeline": _image,
        "QwenImageInpaintPipeline": _inpaint,
        "QwenImageControlNetPipeline": _control,
        "QwenImageControlNetInpaintPipeline": _control_inpaint,
        "QwenImageEditPipeline": _edit,
        "QwenImageEditPlusPipeline": _edit,
        "QwenImageEditInpaintPipeline": lambda name: _edit(name, mask_image=c.mask(), strength=0.8),
        "QwenImageLayeredPipeline": lambda name: _edit(name, 640, True, layers=1, resolution=640, cfg_normalize=False),
    }
)
