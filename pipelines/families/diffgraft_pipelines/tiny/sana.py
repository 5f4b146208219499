"""Tiny Sana pipelines: two blocks; five frames of a video."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler
from transformers import Gemma2Config, Gemma2Model

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import HEAD, HEADS, WIDTH, small

CHANNELS = 4
SIDE = 32
CROSS = {"num_cross_attention_heads": HEADS, "cross_attention_head_dim": HEAD}


def _vae() -> AutoencoderDC:
    """Four pixels to a latent."""
    blocks = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 8, 8),
            "qkv_multiscales": ((), (), (5,)),
            "layers_per_block": (1, 1, 1),
        }.items()
    }
    return AutoencoderDC(latent_channels=CHANNELS, attention_head_dim=4, scaling_factor=0.4, **blocks)


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    video = "Video" in name
    sizes = {"in_channels": CHANNELS, "out_channels": CHANNELS, "sample_size": SIDE // 4, **CROSS}
    model = "SanaVideoTransformer3DModel" if video else "SanaTransformer2DModel"
    more = {"controlnet": small("SanaControlNetModel", num_layers=1, **sizes)} if "ControlNet" in name else {}
    text = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    pipe = getattr(diffusers, name)(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=2, head_dim=16, pad_token_id=0, **text)),
        vae=c.wan_vae(CHANNELS) if video else _vae(),
        transformer=small(model, **sizes),
        scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **more,
    )
    texts = {"prompt": c.PROMPT, "negative_prompt": c.NEGATIVE, "max_sequence_length": 32, "complex_human_instruction": None}
    size = {"height": SIDE, "width": SIDE, "use_resolution_binning": False}
    return c.finish(pipe, guidance_scale=4.5, **texts, **size, **kwargs)


make = c.maker(
    {
        "SanaPipeline": _pipeline,
        "SanaControlNetPipeline": lambda name: _pipeline(name, control_image=c.picture(SIDE, 1)),
        "SanaVideoPipeline": lambda name: _pipeline(name, frames=5),
    }
)
