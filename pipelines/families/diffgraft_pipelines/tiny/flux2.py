"""Tiny FLUX.2 pipelines, dev and Klein: two double and two single blocks; ``@image`` has a picture to go by."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS = 4
LAYERS = (1, 2)
"""Of the text encoder: what they give stands side by side."""


def _pipeline(name: str, guidance_embeds: bool = False, **kwargs: object) -> Tiny:
    tokenizer = c.chat_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4, sample_size=c.SIDE
    )
    sizes = {"in_channels": 4 * CHANNELS, "joint_attention_dim": len(LAYERS) * WIDTH, "timestep_guidance_channels": 32}
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=c.qwen3_text(tokenizer),
        tokenizer=tokenizer,
        transformer=small("Flux2Transformer2DModel", num_layers=2, guidance_embeds=guidance_embeds, **sizes),
    )
    if "Inpaint" not in name:  # its size is the picture's
        kwargs |= {"height": c.SIDE, "width": c.SIDE}
    texts = {"max_sequence_length": 40, "text_encoder_out_layers": LAYERS}
    return c.finish(pipe, prompt=c.PROMPT, guidance_scale=3.0, **texts, **kwargs)


def _dev(name: str, **kwargs: object) -> Tiny:
    """With a guidance scale for an input, and the small text encoder of Klein."""
    tiny = _pipeline(name, guidance_embeds=True, **kwargs)
    tiny.pipe.tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'][0]['text'] }}{% endfor %}"  # type: ignore[attr-defined]
    tiny.pipe.system_message = ""  # type: ignore[attr-defined]  # the tokenizer would spell it
    return tiny


make = c.maker(
    {
        "Flux2Pipeline": _dev,
        "Flux2Pipeline@image": lambda name: _dev(name, image=c.picture()),
        "Flux2KleinPipeline": _pipeline,
        "Flux2KleinPipeline@image": lambda name: _pipeline(name, image=c.picture()),
        "Flux2KleinInpaintPipeline": lambda name: _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8),
    }
)
