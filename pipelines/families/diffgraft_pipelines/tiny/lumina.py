"""Tiny Lumina pipelines: two blocks; of Lumina 2 two of each kind."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel, GemmaTokenizer

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small


def tokenizer() -> GemmaTokenizer:
    """One token a character."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *sorted(ByteLevel.alphabet())]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], padding_side="right")


def text(of: GemmaTokenizer, second: bool) -> Any:
    """A two-layer Gemma."""
    sizes: dict[str, Any] = {
        "vocab_size": len(of),
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return Gemma2Model(Gemma2Config(**sizes)) if second else GemmaModel(GemmaConfig(**sizes))


def _pipeline(name: str) -> Tiny:
    words, second = tokenizer(), "2" in name
    if second:
        sizes: dict[str, Any] = {"in_channels": 4, "num_refiner_layers": 2, "multiple_of": 8, "axes_lens": (64, 32, 32)}
        model, more = small("Lumina2Transformer2DModel", **sizes), {"system_prompt": "", "max_sequence_length": 48}
    else:
        model, more = small("LuminaNextDiT2DModel", sample_size=8, num_kv_heads=2, multiple_of=8), {}
        torch.nn.init.normal_(model.pad_token)  # diffusers leaves it as the memory was
    pipe = getattr(diffusers, name)(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=c.vae(shift_factor=0.1) if second else c.vae(),
        text_encoder=text(words, second),
        tokenizer=words,
    )
    size = {"height": c.SIDE, "width": c.SIDE, **more}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, **size)


make = c.maker(dict.fromkeys(("LuminaPipeline", "Lumina2Pipeline"), _pipeline))
