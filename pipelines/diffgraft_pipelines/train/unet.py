"""Stage 3: the U-Net and the text encoder, trained jointly on latents of the pool."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, partial
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

BATCH = 32
POSITIONS = 16
TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1
NOISY = 0.8
"""Share of the noise schedule from which on timesteps count as noisy: there the place of the object is decided."""
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Phase:
    """A part of the training: its share of the steps, learning rate, and how many timesteps of a batch are noisy ones."""

    name: str
    share: float
    learning_rate: float
    noisy: int
    seed: int
    horizon: float = 1.0
    """Where the learning rate's cosine would end, in lengths of the phase."""
    gentle: float = 0.0
    """Share of the phase at its beginning with uniform timesteps and a loss weight of at most 10, later 100."""

    def draw(self, generator: torch.Generator, gentle: bool) -> Tensor:
        """(BATCH,) times in 0..1, spread evenly over the noisy part and over the whole (denser where noisier)."""
        few, rest = torch.rand(self.noisy, generator=generator), torch.rand(BATCH - self.noisy, generator=generator)
        high = NOISY + (1 - NOISY) * (torch.arange(self.noisy) + few) / max(1, self.noisy)
        return torch.cat([high, ((torch.arange(len(rest)) + rest) / len(rest)) ** (1.0 if gentle else 0.7)])


PHASES = (
    Phase("unet", 5000 / 8000, 1e-3, noisy=0, seed=2, horizon=1.6, gentle=0.5),
    Phase("unet-places", 600 / 8000, 1e-3, noisy=26, seed=3),
    Phase("unet-final", 2400 / 8000, 7e-4, noisy=6, seed=4),
)
"""Objects, colours and sizes are learned first, places last: later phases draw more of a batch from noisy timesteps."""


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with DDIM sampling."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
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
    """An untrained U-Net of three levels for 16 x 16 x 4 latents."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
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
    tokenizer = build_tokenizer()
    modules: dict[str, nn.Module] = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    unet, text_encoder = modules["unet"], modules["text_encoder"]
    unet.set_attn_processor(AttnProcessor())
    alphas = build_scheduler().alphas_cumprod
    device = accelerator.device

    @cache
    def tokenize(text: str) -> list[int]:
        return tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True).input_ids

    def loss(step: int, phase: Phase) -> Tensor:
        generator = step_generator(seed + phase.seed, step)
        index = torch.randint(len(mean), (BATCH,), generator=generator)
        captions = pool.captions(index, np.random.default_rng([seed + phase.seed - 2, step]))
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        tokens = torch.tensor([tokenize(text) for text in captions])
        shape = (BATCH, *mean.shape[1:])
        latents = mean[index].float() + deviation[index].float() * torch.randn(shape, generator=generator)
        noise = torch.randn(shape, generator=generator)
        gentle = step < phase.gentle * phase.share * steps
        timesteps = (phase.draw(generator, gentle) * len(alphas)).long().clamp(max=len(alphas) - 1)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        hidden = text_encoder(tokens.to(device)).last_hidden_state
        out = unet(noisy.to(device), timesteps.to(device), hidden).sample
        weight = ((1 - alpha) / alpha).clamp(1, 10 if gentle else 100).to(device)
        return (weight * (out.float() - noise.to(device)).square()).mean()

    averages = {}
    for phase in PHASES:
        count = round(phase.share * steps)
        stage = Stage(phase.name, folder, modules, count, phase.learning_rate, accelerator, horizon=round(phase.horizon * count))
        averages = stage.run(partial(loss, phase=phase))
    return load_averages(averages, tokenizer)


def load_averages(
    averages: dict[str, dict[str, Tensor]], tokenizer: CLIPTokenizer
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """U-Net and text encoder with these averaged weights, on the CPU in fp32."""
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    unet.load_state_dict(averages["unet"])
    text_encoder.load_state_dict(averages["text_encoder"])
    return unet.eval(), text_encoder.eval(), tokenizer
