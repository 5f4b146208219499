"""A tiny Hunyuan-DiT pipeline: four blocks, the last of which takes what the first gave."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import DDPMScheduler
from transformers import BertConfig, BertModel

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small


def _pipeline(name: str, **kwargs: object) -> Tiny:
    words, t5 = c.t5_tokenizer(), c.t5_tokenizer()
    text = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"in_channels": 4, "patch_size": 2, "sample_size": 8, "cross_attention_dim_t5": WIDTH, "activation_fn": "gelu-approximate"}
    more = {"controlnet": small("HunyuanDiT2DControlNetModel", transformer_num_layers=4, **sizes)} if "ControlNet" in name else {}
    pipe = getattr(diffusers, name)(
        vae=c.still(c.vae()) if more else c.vae(),
        text_encoder=BertModel(BertConfig(vocab_size=len(words), pad_token_id=0, **text)),
        tokenizer=words,
        transformer=small("HunyuanDiT2DModel", num_layers=4, **sizes),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.02, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=c.t5_text(t5),
        tokenizer_2=t5,
        **more,
    )
    size = {"height": c.SIDE, "width": c.SIDE, "use_resolution_binning": False}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **size, **kwargs)


make = c.maker(
    {
        "HunyuanDiTPipeline": _pipeline,
        "HunyuanDiTControlNetPipeline": lambda name: _pipeline(name, control_image=c.picture(seed=1)),
    }
)
