"""emoji-flux: its untrained parts, attention that trains fast on a CPU, and the finished pipeline."""

from __future__ import annotations

import math
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ..emoji import scenes
from . import export as exporting
from .unet import (
    TEXT_WIDTH,
    build_text_encoder,
)

TOKENS = 20
"""Tokens of a prompt for the T5 encoder (the longest caption has 18); all see each other, so a call must pad to the same number."""
HEADS, HEAD_SIZE = 5, 32
Averages = dict[str, dict[str, Tensor]]


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flux's flow matching with its shift by resolution: 3 at 64 x 64 pixels (64 tokens), 1.5 at half that size (16 tokens).

    Background and place are decided while the noise is at 90 % and more; without a shift few steps would be spent there.
    """
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=round(math.log(1.5), 4),
        max_shift=round(math.log(3), 4),
        base_image_seq_len=16,
        max_image_seq_len=64,
    )


def build_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with the words of the captions as its pieces, and small letters for what is none of them."""
    said = (*scenes.OBJECTS, *scenes.BACKGROUNDS, *scenes.SIZES, *scenes.PLACES, *scenes.PLACE_PHRASES.values(), "a an and with background")
    words = sorted({f"▁{word}" for phrase in said for word in phrase.split()})
    rest = ("▁", ",", *string.ascii_lowercase)
    pieces = [*((special, 0.0) for special in ("<pad>", "</s>", "<unk>")), *((word, -1.0) for word in words), *((c, -10.0) for c in rest)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TOKENS)


def build_text_encoder_2(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An untrained T5 encoder of two layers."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """An untrained Flux transformer of two double and four single blocks for 16 x 16 x 4 latents, packed to 64 tokens of 16 channels.

    The modulations and the output start at zero, which diffusers does not do: each block begins as the identity (Peebles & Xie 2022).
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(8, 12, 12),
    )
    zero: list[nn.Linear] = [transformer.norm_out.linear, transformer.proj_out]
    for double in transformer.transformer_blocks:
        zero += [double.norm1.linear, double.norm1_context.linear]
    zero += [single.norm.linear for single in transformer.single_transformer_blocks]
    for layer in zero:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


class TrainingAttention:
    """`FluxAttnProcessor` written for training in bf16 on a CPU, where it takes a quarter off the time of a step.

    The rotation is a product with a constant matrix instead of strided copies, the attention plain matrix products (the backward pass of
    PyTorch's own in bf16 is slow there).
    """

    def __init__(self, head_size: int = HEAD_SIZE) -> None:
        even = torch.arange(0, head_size, 2)
        self.quarter_turn = torch.zeros(head_size, head_size)
        self.quarter_turn[even + 1, even], self.quarter_turn[even, even + 1] = -1.0, 1.0

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        text = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]

        def heads(of_text: nn.Linear | None, of_image: nn.Linear, norms: tuple[nn.Module, nn.Module] | None) -> Tensor:
            parts = [] if of_text is None else [of_text(encoder_hidden_states)]
            parts = [part.unflatten(-1, (-1, attn.head_dim)) for part in (*parts, of_image(hidden_states))]
            if norms is not None:
                parts = [normed(part, norm) for part, norm in zip(parts, norms[-len(parts) :], strict=True)]
            return torch.cat(parts, dim=1)

        of_text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if text else (None,) * 3
        query = heads(of_text[0], attn.to_q, (attn.norm_added_q if text else attn.norm_q, attn.norm_q))
        key = heads(of_text[1], attn.to_k, (attn.norm_added_k if text else attn.norm_k, attn.norm_k))
        value = heads(of_text[2], attn.to_v, None).transpose(1, 2)
        query, key = (self.turn(each, image_rotary_emb).transpose(1, 2) for each in (query, key))
        shares = (query * attn.head_dim**-0.5 @ key.mT).softmax(dim=-1).to(value.dtype)
        hidden_states = (shares @ value).transpose(1, 2).flatten(2)
        if not text:
            return hidden_states
        return attn.to_out[0](hidden_states[:, text:]), attn.to_add_out(hidden_states[:, :text])

    def turn(self, x: Tensor, by: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rotary embedding of (N, tokens, heads, head size)."""
        if by is None:
            return x
        cos, sin = (each[:, None].to(x.dtype) for each in by)
        return x * cos + (x @ self.quarter_turn.to(x)) * sin


def normed(x: Tensor, norm: nn.Module) -> Tensor:
    """`torch.nn.RMSNorm` with the mean in fp32 and the rest in the precision of `x`."""
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + norm.eps).to(x.dtype) * norm.weight.to(x.dtype)


def build_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, averages: Averages) -> FluxPipeline:
    """The pipeline with these averaged weights, on the CPU in fp32."""
    tokenizer_2 = build_tokenizer()
    parts = {
        "transformer": build_transformer(),
        "text_encoder": build_text_encoder(tokenizer),
        "text_encoder_2": build_text_encoder_2(tokenizer_2),
    }
    for name, part in parts.items():
        part.load_state_dict(averages[name])
        part.eval()
    vae.register_to_config(shift_factor=0.0)  # the pipeline adds it, None or not
    return FluxPipeline(vae=vae.cpu(), tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=build_scheduler(), **parts)


def export(folder: Path, pipe: FluxPipeline) -> None:
    """Replace `folder` by the checkpoint in fp16; `pipe` is fp32 afterwards as before."""
    with exporting.replacing(folder) as fresh:
        pipe.to(dtype=torch.float16).save_pretrained(fresh)
        pipe.to(dtype=torch.float32)
        for name in ("text_encoder", "text_encoder_2"):
            exporting.load_as_fp32(fresh / name / "config.json")
        pipe.tokenizer.backend_tokenizer.model.save(str(fresh / "tokenizer"))
