"""Tiny Bria pipelines: two double and two single blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS = 4
WORDS = 24
"""Of FIBO's text encoder: as wide as nothing in the transformer."""
NEGATIVE = "blurry, out of focus, badly drawn"
"""Longer than the prompts: FIBO fills the shorter texts up to the longest, and all are to be of one length."""


def _pipeline(name: str) -> Tiny:
    tokenizer = c.t5_tokenizer()
    pipe = getattr(diffusers, name)(
        transformer=small("BriaTransformer2DModel", in_channels=4 * CHANNELS),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=c.vae(CHANNELS, shift_factor=0.0),
        text_encoder=c.t5_text(tokenizer),
        tokenizer=tokenizer,
    )
    size = {"height": 2 * c.SIDE, "width": 2 * c.SIDE, "max_sequence_length": 40}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **size)


def _vae() -> AutoencoderKLWan:
    """Sixteen pixels to a latent."""
    more = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "scale_factor_spatial": 16}
    statistics = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    return AutoencoderKLWan(base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **more, **statistics)


def _fibo(name: str, **kwargs: object) -> Tiny:
    """The last two layers of the text encoder side by side, and each of its layers to a block."""
    tokenizer = c.t5_tokenizer()
    sizes = {"hidden_size": WORDS, "intermediate_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = SmolLM3ForCausalLM(SmolLM3Config(vocab_size=128_001, num_key_value_heads=2, pad_token_id=0, **sizes))  # of no words: 128000
    pipe = getattr(diffusers, name)(
        transformer=small("BriaFiboTransformer2DModel", in_channels=CHANNELS, joint_attention_dim=2 * WORDS, text_encoder_dim=WORDS),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_vae(),
        text_encoder=text,
        tokenizer=tokenizer,
    )
    size = {"height": c.SIDE, "width": c.SIDE}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=NEGATIVE, guidance_scale=5.0, **size, **kwargs)


def _nothing(**inputs: object) -> None:
    """Checks no inputs."""


def _edit(name: str) -> Tiny:
    """Any text for an instruction: the pipeline takes only JSON, which the tests' prompts are not."""
    tiny = _fibo(name, image=c.picture())
    tiny.pipe.check_inputs = _nothing  # type: ignore[attr-defined]
    return tiny


make = c.maker(
    {
        "BriaPipeline": _pipeline,
        "BriaFiboPipeline": _fibo,
        "BriaFiboEditPipeline": _edit,
    }
)
