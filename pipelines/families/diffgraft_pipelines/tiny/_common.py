"""What the tiny pipelines share: seeded weights, offline tokenizers, small encoders, VAEs and input pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import numpy as np
import torch
from diffgraft import Tiny
from diffgraft.methods.inputs import parameters
from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline, ModularPipeline, UniPCMultistepScheduler
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPT = "a red apple on the left"
NEGATIVE = "blurry"
SIDE = 64


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Everything drawn inside depends on ``seed`` only; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomise(module: torch.nn.Module) -> None:
    """Random values for constant parameters (zero convolutions, adaLN modulation...), so that every input matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter) * 0.1)


def silence(pipe: Any) -> None:
    """No progress bars: of a modular pipeline, none of any block's either."""
    pipe.set_progress_bar_config(disable=True)
    todo = [pipe._blocks] if isinstance(pipe, ModularPipeline) else []
    while todo:
        block = todo.pop()
        todo += getattr(block, "sub_blocks", {}).values()
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)


def modular(name: str, standard: Tiny, **kwargs: object) -> Tiny:
    """A modular pipeline of a standard one's parts, called with those of its arguments that there are, and ``kwargs``."""
    made: Any = getattr(diffusers, name)()
    parts = standard.pipe.components.items()  # type: ignore[attr-defined]
    made.update_components(**{part: value for part, value in parts if value is not None and part in made._component_specs})
    takes = {*parameters(made)}
    return finish(made, **{key: value for key, value in {**standard.kwargs, **kwargs}.items() if key in takes})


def finish(pipe: DiffusionPipeline | ModularPipeline, **kwargs: object) -> Tiny:
    """Randomise what was left constant, switch to inference and silence the progress bar."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            randomise(component)
            component.eval().requires_grad_(False)
    silence(pipe)
    return Tiny(pipe, {"num_inference_steps": 4, "output_type": "np", **kwargs})


def maker(builders: dict[str, Callable[[str], Tiny]]) -> Callable[[str, int], Tiny]:
    """``make(class_name, seed)`` of one family, from one builder a class name (``Class`` or ``Class@variant``)."""

    def make(class_name: str, seed: int = 0) -> Tiny:
        if class_name not in builders:
            raise KeyError(f"no tiny pipeline {class_name!r}; this family has {', '.join(builders)}")
        with seeded(seed):
            return builders[class_name](class_name.partition("@")[0])

    return make


def picture(side: int = SIDE, seed: int = 0) -> Image.Image:
    """A smooth random RGB picture."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def video(frames: int, side: int = SIDE) -> list[Image.Image]:
    """Pictures, one a frame."""
    return [picture(side, seed) for seed in range(frames)]


def mask(side: int = SIDE) -> Image.Image:
    """White where to paint: the right half."""
    image = Image.new("L", (side, side), 0)
    image.paste(255, (side // 2, 0, side, side))
    return image


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-level, no merges: one token a character."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def clip_text(tokenizer: CLIPTokenizer, *, projection: int | None = None, hidden: int = 32) -> Any:
    """A two-layer CLIP text encoder; with ``projection`` the variant that also returns a pooled projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=projection or hidden,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def clip_vision(side: int = 32) -> CLIPVisionModelWithProjection:
    """A two-layer CLIP picture encoder."""
    config = CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=side,
        patch_size=side // 4,
    )
    return CLIPVisionModelWithProjection(config)


def clip_image_processor(side: int = 32) -> CLIPImageProcessor:
    """The processor of :func:`clip_vision`."""
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def t5_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary of the printable ASCII characters."""
    letters = [chr(code) for code in range(33, 127)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in letters)], extra_ids=0, model_max_length=512)


def t5_config(tokenizer: T5Tokenizer) -> dict[str, int]:
    """The sizes of a small T5 or UMT5 encoder."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def t5_text(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A two-layer T5 encoder."""
    return T5EncoderModel(T5Config(**t5_config(tokenizer)))


def chat_tokenizer() -> Qwen2Tokenizer:
    """Bytes, no merges, and a chat template that adds nothing but the marks of a turn."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    result = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    result.chat_template = "{% for turn in messages %}<|im_start|>{{ turn['content'] }}<|im_end|>{% endfor %}"
    return result


def qwen3_text(tokenizer: Qwen2Tokenizer) -> Qwen3ForCausalLM:
    """A two-layer Qwen3."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    return Qwen3ForCausalLM(config)


def umt5_text(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """The text encoder of Wan and its relatives."""
    return UMT5EncoderModel(UMT5Config(**t5_config(tokenizer)))


def wan_vae(channels: int) -> AutoencoderKLWan:
    """The video autoencoder of Wan and its relatives."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=channels,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def flow_unipc(shift: float) -> UniPCMultistepScheduler:
    """The scheduler that Wan and its relatives ship with."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=shift)


MEAN = 64.0
"""Of the latents of a :func:`still` autoencoder; the shift that its pipeline has to take away."""


def still(model: Any) -> Any:
    """Latents so large, and drawn so narrowly, that the draw is lost in rounding: some pipelines draw it from the global generator."""
    half = model.quant_conv.bias.numel() // 2
    with torch.no_grad():
        model.quant_conv.weight[half:] = 0.0
        model.quant_conv.bias[half:] = -30.0
        model.quant_conv.bias[:half] += MEAN
        model.post_quant_conv.bias -= MEAN * model.post_quant_conv.weight.flatten(1).sum(1)
    return model


def narrow(unet: Any) -> Any:
    """A learned variance within -1 and 1, as trained models have it: it is an exponent."""
    with torch.no_grad():
        for weight in unet.conv_out.parameters():
            weight[len(weight) // 2 :] *= 0.1
    return unet


def vae(channels: int = 4, **config: object) -> AutoencoderKL:
    """A small AutoencoderKL with the usual factor of 8 between pixels and latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIDE,
        **config,
    )
