"""Stage 3: the U-Net and the text encoder, trained jointly on latents of the pool."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from .pool import Pairs, Pool, to_float

BATCH = 64
POSITIONS = 24
TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1
LEARNING_RATE = 1e-3
PAIRS_LEARNING_RATE = 5e-4
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
    said = (*scenes.OBJECTS, *scenes.BACKGROUNDS, *scenes.SIZES, *scenes.PLACE_PHRASES.values(), "a an and with background")
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


def build_unet(widths: tuple[int, int, int] = (32, 64, 128), layers: int = 2, groups: int = 16) -> UNet2DConditionModel:
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
        block_out_channels=widths,
        layers_per_block=layers,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        attention_head_dim=(1, 2, 4),
        norm_num_groups=groups,
    )


@torch.no_grad()
def encode_pool(pool: Pool | Pairs, vae: AutoencoderKL, folder: Path, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Scaled means and deviations of the latents of the pool, each (N, 4, 16, 16) fp16, kept on disk."""
    path = folder / f"latents-{type(pool).__name__.lower()}-{len(pool.pictures)}-{vae.config.scaling_factor}.pt"
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


Encoded = tuple[Pool | Pairs, Tensor, Tensor]
"""Pictures with the means and deviations of their latents."""


def draw_batch(
    pools: Sequence[Encoded], generator: torch.Generator, rng: np.random.Generator, odds: Tensor | None = None
) -> tuple[Tensor, list[str]]:
    """Latents (BATCH, 4, 16, 16), drawn from their posteriors, and captions, from the pictures of all `pools` together.

    Every picture is as likely as any other, or as `odds` (one positive number a picture) say.
    """
    if odds is None:
        order = torch.randint(sum(len(mean) for _, mean, _ in pools), (BATCH,), generator=generator)
    else:
        order = torch.multinomial(odds, BATCH, replacement=True, generator=generator)
    start, latents, captions = 0, [], []
    for pool, mean, deviation in pools:
        index = order[(order >= start) & (order < start + len(mean))] - start
        spread = torch.randn((len(index), *mean.shape[1:]), generator=generator)
        latents.append(mean[index].float() + deviation[index].float() * spread)
        captions += pool.captions(index, rng)
        start += len(mean)
    return torch.cat(latents), captions


@dataclass(frozen=True)
class Batch:
    """One step's training data; all tensors on the training device, one row a picture."""

    latents: Tensor
    tokens: Tensor
    noise: Tensor
    timesteps: Tensor
    alpha: Tensor
    """alphas_cumprod at the timesteps, (BATCH, 1, 1, 1)."""

    @property
    def noisy(self) -> Tensor:
        return self.alpha.sqrt() * self.latents + (1 - self.alpha).sqrt() * self.noise

    @property
    def v(self) -> Tensor:
        return self.alpha.sqrt() * self.noise - (1 - self.alpha).sqrt() * self.latents


class Batches:
    """Draws the batch of a step, always the same for the same step: pictures of `pools` evenly, captions, noise, timesteps."""

    def __init__(
        self,
        pools: Sequence[Pool | Pairs],
        vae: AutoencoderKL,
        tokenizer: CLIPTokenizer,
        folder: Path,
        seed: int,
        device: torch.device,
        timesteps: Callable[[int, torch.Generator, float], Tensor] | None = None,
        odds: Tensor | None = None,
    ) -> None:
        self.pools = [(pool, *encode_pool(pool, vae, folder)) for pool in pools]
        self.tokenizer = tokenizer
        self.alphas = build_scheduler().alphas_cumprod
        self.seed = seed
        self.device = device
        self.timesteps = timesteps or draw_timesteps
        self.odds = odds
        self.known: dict[str, list[int]] = {}

    def draw(self, step: int, progress: float, pools: int | None = None, dropout: float = CAPTION_DROPOUT) -> Batch:
        """The batch of `step`, from the first `pools` of the pools; `progress` is the share of the steps that are done."""
        generator, rng = step_generator(self.seed + 2, step), np.random.default_rng([self.seed, step])
        latents, captions = draw_batch(self.pools[:pools], generator, rng, self.odds)
        dropped = torch.rand(BATCH, generator=generator) < dropout
        tokens = torch.tensor([self.tokenize("" if d else c) for c, d in zip(captions, dropped.tolist(), strict=True)])
        latents += slope_at(progress) * SLOPE
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = self.timesteps(len(self.alphas), generator, progress)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        return Batch(*(each.to(self.device) for each in (latents, tokens, noise, timesteps, alpha)))

    def tokenize(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True).input_ids
        return self.known[text]


def train_unet(
    pool: Pool, pairs: Pairs, vae: AutoencoderKL, folder: Path, steps: tuple[int, int], seed: int, accelerator: Accelerator
) -> tuple[UNet2DConditionModel, CLIPTextModel, CLIPTokenizer]:
    """The trained U-Net and text encoder (averaged weights, fp32) and their tokenizer.

    Single objects alone for `steps[0]`, then single objects and pairs together for `steps[1]`.
    """
    torch.manual_seed(seed + 2)
    tokenizer = load_tokenizer(folder)
    batches = Batches([pool, pairs], vae, tokenizer, folder, seed, accelerator.device)
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    unet.set_attn_processor(AttnProcessor())
    modules: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}

    def loss(batch: Batch, progress: float) -> Tensor:
        hidden = text_encoder(batch.tokens).last_hidden_state
        out = unet(batch.noisy, batch.timesteps, hidden).sample
        return (loss_weight(batch.alpha, progress) * (out.float() - batch.v).square()).mean()

    singles = Stage("unet", folder, modules, steps[0], LEARNING_RATE, accelerator)
    averages = singles.run(lambda step: loss(batches.draw(step, step / steps[0], pools=1), step / steps[0]))
    for name, module in modules.items():
        module.load_state_dict(averages[name])
    both = Stage("unet-pairs", folder, modules, steps[1], PAIRS_LEARNING_RATE, accelerator)
    return load_averages(both.run(lambda step: loss(batches.draw(steps[0] + step, 1.0), 1.0)), tokenizer)


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


def draw_timesteps(count: int, generator: torch.Generator, progress: float, batch: int | None = None) -> Tensor:
    """(batch,) timesteps below `count`, spread evenly, in random order; in the first half of the training denser where noisier (u^0.6)."""
    batch = batch or BATCH
    u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
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
