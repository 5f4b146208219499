"""Sharper edges for a finished emoji-sd: its decoder alone, trained on with a perceptual and an adversarial loss.

The encoder is frozen, so every checkpoint that stands on the latents goes on to fit. Three kinds of latents are decoded: the posterior's,
the same with a little noise, and what the U-Net itself draws, whose edges are less certain than those of any true latent.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.func import functional_call

from ..emoji.judge import Judge, JudgeNet
from .common import Stage, console, step_generator, write_atomic
from .pool import Pool, to_float
from .small import frozen
from .unet import build_scheduler, encode_pool

BATCH, DRAWN_BATCH = 8, 4
CROP = 12
"""Side of the training crops in latent cells (4 pixels each)."""
LEARNING_RATE = 5e-4
NOISE = 0.15
"""Largest deviation of the noise on true latents, as a share of the latents' own deviation."""
PERCEPTUAL, ADVERSARIAL, COLOR = 0.3, 0.04, 1.0
ADVERSARIAL_FROM = 200
"""Steps that the discriminator has to itself first."""
DRAWN = 1024
DRAWN_FROM, DRAWN_STEPS, GUIDANCE = 0.5, 10, 2.0
"""The U-Net draws on from true latents noised up to this share of the schedule (signal-to-noise ratio .2), in so many steps."""


class Discriminator(nn.Sequential):
    """(N, 3, H, W) pictures -> one logit for each patch of 18 pixels, every 4 pixels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1), nn.GroupNorm(8, 2 * width), nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 1),
        )  # fmt: skip


@torch.no_grad()
def draw_on(pool: Pool, mean: Tensor, pipe: StableDiffusionPipeline, path: Path, seed: int, count: int) -> Tensor:
    """(count, 4, 16, 16) latents: the first ones of the pool noised half-way, then drawn on by the U-Net; kept in `path`."""
    if not path.exists():
        console.print(f"decoder: the U-Net draws {count} pictures")
        unet, text_encoder = frozen(pipe, torch.device("cpu"))
        scheduler = build_scheduler()
        scheduler.set_timesteps(round(DRAWN_STEPS / DRAWN_FROM))
        times = scheduler.timesteps[-DRAWN_STEPS:]
        generator, rng, parts = step_generator(seed, 0), np.random.default_rng(seed), []
        for index in torch.arange(count).split(64):
            captions = [*([""] * len(index)), *pool.captions(index, rng)]
            tokens = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
            hidden = text_encoder(tokens).last_hidden_state
            latents = mean[index].float()
            latents = scheduler.add_noise(latents, torch.randn(latents.shape, generator=generator), times[:1].expand(len(index)))
            for time in times:
                without, given = unet(latents.repeat(2, 1, 1, 1), time, hidden).sample.chunk(2)
                latents = scheduler.step(without + GUIDANCE * (given - without), time, latents).prev_sample
            parts.append(latents.half())
        write_atomic(path, lambda p: torch.save(torch.cat(parts), p))
    return torch.load(path, weights_only=True)


def judge_features(net: JudgeNet, pictures: Tensor) -> list[Tensor]:
    """The judge's activations after each of its first four convolutions."""
    found, x = [], pictures
    for layer in net.trunk[:12]:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            found.append(x)
    return found


def perceptual_loss(net: JudgeNet, out: Tensor, target: Tensor) -> Tensor:
    """Mean L1 difference of the judge's activations, each layer relative to its own size."""
    with torch.no_grad():
        wanted = judge_features(net, target)
    pairs = zip(judge_features(net, out), wanted, strict=True)
    return torch.stack([(a.float() - b.float()).abs().mean() / b.float().abs().mean() for a, b in pairs]).mean()


def pixel_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1, and 0.5 L1 of the horizontal and vertical differences."""
    error = out - target
    return error.abs().mean() + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())


def crop(pictures: Tensor, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same random square of CROP cells (the same for the whole batch) of pictures and of their latents."""
    y, x = torch.randint(latents.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
    return pictures[..., 4 * y : 4 * (y + CROP), 4 * x : 4 * (x + CROP)], latents[..., y : y + CROP, x : x + CROP]


def train_decoder(
    pool: Pool, pipe: StableDiffusionPipeline, judge: Judge, folder: Path, steps: int, decay: int, seed: int, accelerator: Accelerator
) -> None:
    """Train the decoder of `pipe` on; it carries the averaged weights afterwards. The encoder is not touched."""
    torch.manual_seed(seed + 7)
    vae, device = pipe.vae, accelerator.device
    mean, deviation = encode_pool(pool, vae, folder)
    count = min(DRAWN, len(mean))
    drawn = draw_on(pool, mean, pipe, folder / f"drawn-{count}.pt", seed + 7, count)
    with torch.no_grad():
        plain = torch.cat([vae.decode(part.float() / vae.config.scaling_factor).sample.half() for part in drawn.split(64)])
    vae.requires_grad_(False)
    decoder = nn.ModuleDict({"conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    discriminator = Discriminator()
    net = judge.net.to(device).requires_grad_(False)

    def decode(latents: Tensor) -> Tensor:
        return decoder["decoder"](decoder["conv"](latents / vae.config.scaling_factor)).float()

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 7, step)
        index = torch.randint(len(mean), (BATCH,), generator=generator)
        spread = deviation[index].float() + NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
        latents = mean[index].float() + spread * torch.randn((BATCH, *mean.shape[1:]), generator=generator)
        true, latents = (each.to(device) for each in crop(to_float(pool.pictures[index]), latents, generator))
        chosen = torch.randint(len(drawn), (DRAWN_BATCH,), generator=generator)
        before, imagined = (each.to(device) for each in crop(plain[chosen].float(), drawn[chosen].float(), generator))
        out, free = decode(torch.cat([latents, imagined])).split([BATCH, DRAWN_BATCH])
        made = torch.cat([out, free])
        # The decoder is judged by a discriminator that it cannot change, the discriminator by pictures that it cannot change.
        fixed = {name: part.detach() for name, part in discriminator.named_parameters()}
        fooled = -functional_call(discriminator, fixed, (made,)).float().mean()
        noticed = F.relu(1 - discriminator(true).float()).mean() + F.relu(1 + discriminator(made.detach()).float()).mean()
        color = (F.avg_pool2d(free, 4) - F.avg_pool2d(before, 4)).abs().mean()
        likeness = pixel_loss(out, true) + PERCEPTUAL * perceptual_loss(net, out, true) + COLOR * color
        return likeness + (ADVERSARIAL if step >= ADVERSARIAL_FROM else 0.0) * fooled + noticed

    modules = {"decoder": decoder, "discriminator": discriminator}
    stage = Stage("decoder", folder, modules, steps, LEARNING_RATE, accelerator, decay=decay)
    decoder.load_state_dict(stage.run(loss)["decoder"])
    vae.eval()
