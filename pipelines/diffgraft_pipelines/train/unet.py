"""Stage 3: the U-Net and the text encoder, trained jointly on latents of the pool."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..emoji import scenes
from .common import Stage, console, step_generator, write_atomic
from .pool import Pool, to_float

BATCH = 64
POSITIONS = 16
TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1
LEARNING_RATE = 1e-3
START, END = "<|startoftext|>", "<|endoftext|>"


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule carried on to a signal-to-noise ratio of 2e-4, DDIM sampling, v-prediction.

    At SD's own last timestep (ratio 5e-3) the place of these objects still shows through the noise, so a U-Net in training reads
    it there instead of in the caption, and from pure noise it follows the caption no more. A prediction of the noise would have
    to copy its input there; v (Salimans & Ho 2022, appendix D) is nearly the negated picture, so the loss is about the caption.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a byte-pair vocabulary built from the captions: every word of theirs is one token."""
    said = (*scenes.OBJECTS, *scenes.BACKGROUNDS, *scenes.SIZES, *scenes.PLACE_PHRASES.values(), "a an with background")
    captions = [f"{words}," for words in (*said, *scenes.PLACES)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=POSITIONS)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of the training in `folder`, built there once: pairs of equal frequency are merged in no fixed order."""
    path = folder / "tokenizer"
    if not path.exists():
        build_tokenizer().save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path, local_files_only=True)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder of two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained U-Net of three levels for 16 x 16 x 4 latents.

    Besides cross-attention the caption also joins the time embedding, as in DeepFloyd IF: from cross-attention alone, size and
    object did not show in the noisiest steps within 400 steps of training; with it they did within 200.
    """
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=16,
    )


@torch.no_grad()
def encode_pool(pool: Pool, vae: AutoencoderKL, folder: Path, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Scaled means and deviations of the latents of the pool, each (N, 4, 16, 16) fp16, kept on disk."""
    path = folder / f"latents-{len(pool.pictures)}-{vae.config.scaling_factor}.pt"
    if not path.exists():
        console.print(f"encoding {len(pool.pictures)} scenes")
        parts = []
        for pictures in pool.pictures.split(batch):
            posterior = vae.encode(to_float(pictures).to(vae.device)).latent_dist
            both = torch.stack([posterior.mean, posterior.std]) * vae.config.scaling_factor
            parts.append(both.half().cpu())
        write_atomic(path, lambda p: torch.save(torch.cat(parts, dim=1), p))
    mean, deviation = torch.load(path, weights_only=True)
    return mean, deviation


def train_unet(
    pool: Pool, vae: AutoencoderKL, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """The trained U-Net and text encoder (averaged weights, fp32) and their tokenizer."""
    torch.manual_seed(seed + 2)
    mean, deviation = encode_pool(pool, vae, folder)
    tokenizer = load_tokenizer(folder)
    modules: dict[str, nn.Module] = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    unet.set_attn_processor(AttnProcessor())
    alphas = build_scheduler().alphas_cumprod
    device = accelerator.device

    @cache
    def tokenize(text: str) -> list[int]:
        return tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True).input_ids

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 2, step)
        index = torch.randint(len(mean), (BATCH,), generator=generator)
        captions = pool.captions(index, np.random.default_rng([seed, step]))
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        tokens = torch.tensor([tokenize(text) for text in captions])
        shape = (BATCH, *mean.shape[1:])
        latents = mean[index].float() + deviation[index].float() * torch.randn(shape, generator=generator)
        latents += slope_at(step / steps) * SLOPE
        noise = torch.randn(shape, generator=generator)
        timesteps = draw_timesteps(len(alphas), generator, step / steps)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
        hidden = text_encoder(tokens.to(device)).last_hidden_state
        out = unet(noisy.to(device), timesteps.to(device), hidden).sample
        return (loss_weight(alpha, step / steps).to(device) * (out.float() - v.to(device)).square()).mean()

    stage = Stage("unet", folder, modules, steps, LEARNING_RATE, accelerator)
    return load_averages(stage.run(loss), tokenizer)


def slope_at(progress: float) -> float:
    """How much of ``SLOPE`` the training latents carry after this share of the steps: from 15 % on, fading out up to 40 %.

    The scenes are symmetric, so a U-Net soon tells the middle from the edge but has no use for left against right or up against
    down, except with the word for the place, and that is learned only once such features exist: without the slope neither had
    begun after 1,250 steps. A brightness that rises to the right and to the bottom makes the features; it is gone long before the end.
    """
    if progress < 0.15:
        return 0.0
    return min(1.0, max(0.0, (0.4 - progress) / 0.1))


SLOPE = 0.5 * torch.stack([torch.linspace(-1, 1, 16).expand(16, 16), torch.linspace(-1, 1, 16)[:, None].expand(16, 16)] * 2)
"""(4, 16, 16): rises to the right in two channels, to the bottom in the other two."""


def draw_timesteps(count: int, generator: torch.Generator, progress: float) -> Tensor:
    """(BATCH,) timesteps below `count`, spread evenly; in the first half of the training denser where noisier (u^0.6)."""
    u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
    return (u ** (0.6 if progress < 0.5 else 1.0) * count).long().clamp(max=count - 1)


def loss_weight(alpha: Tensor, progress: float) -> Tensor:
    """Weight of the squared error of v; that is the squared error of the clean latents times 1 + SNR.

    The first half of the training weights the error of the clean latents by clamp(SNR, 1, 5): Salimans & Ho's truncated SNR below,
    min-SNR-5 (Hang et al. 2023) above. There background, size and place are learned, at the noisiest timesteps. The second half takes
    clamp(10 SNR, 1, 20), about the inverse of the error at each noise level: shapes are decided where SNR is near 1.
    """
    snr = alpha / (1 - alpha)
    return (snr.clamp(1, 5) if progress < 0.5 else (10 * snr).clamp(1, 20)) / (1 + snr)


def load_averages(
    averages: dict[str, dict[str, Tensor]], tokenizer: CLIPTokenizer
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """U-Net and text encoder with these averaged weights, on the CPU in fp32."""
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    unet.load_state_dict(averages["unet"])
    text_encoder.load_state_dict(averages["text_encoder"])
    return unet.eval(), text_encoder.eval(), tokenizer
