"""Stage 1: the autoencoder, 64 x 64 x 3 pixels to 16 x 16 x 4 latents and back."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from .common import Stage, console, step_generator
from .pool import Pool, to_bytes, to_float

CROP = 32
BATCH = 24
KL_WEIGHT = 5e-4


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder of 0.92 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def crops(pool: Pool, batch: int, generator: torch.Generator) -> Tensor:
    """(batch, 3, 32, 32) crops in -1..1; most of them near the object, where the detail is."""
    index = torch.randint(len(pool.pictures), (batch,), generator=generator)
    shift = (torch.rand(batch, 2, generator=generator) - 0.5) * 36
    corner = (pool.centers[index] + shift - CROP / 2).round().clamp(0, pool.pictures.shape[-1] - CROP).long()
    return to_float(
        torch.stack([pool.pictures[i, :, y : y + CROP, x : x + CROP] for i, (x, y) in zip(index.tolist(), corner.tolist(), strict=True)])
    )


def reconstruction_loss(out: Tensor, target: Tensor) -> Tensor:
    """L1 + 0.5 MSE + 0.25 L1 of the horizontal and vertical differences (both (N, 3, H, W))."""
    error = out.float() - target
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 0.5 * error.square().mean() + 0.25 * gradients


def train_vae(pool: Pool, folder: Path, steps: int, seed: int, accelerator: Accelerator) -> AutoencoderKL:
    """The trained autoencoder (averaged weights, fp32, scaling factor set to 1 / latent standard deviation)."""
    torch.manual_seed(seed)
    vae = build_vae()
    stage = Stage("vae", folder, {"vae": vae}, steps, 2e-3, accelerator, ema=0.999)

    def loss(step: int) -> Tensor:
        generator = step_generator(seed, step)
        pictures = crops(pool, BATCH, generator).to(accelerator.device)
        posterior = vae.encode(pictures).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(accelerator.device)
        latents = posterior.mean + posterior.std * noise
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(vae.decode(latents).sample, pictures) + KL_WEIGHT * kl

    vae.load_state_dict(stage.run(loss)["vae"])
    vae.eval()
    with torch.no_grad():
        posterior = vae.encode(to_float(pool.pictures[:512]).to(accelerator.device)).latent_dist
    deviation = float((posterior.mean.var() + posterior.var.mean()).sqrt())
    vae.register_to_config(scaling_factor=round(1 / deviation, 4))
    console.print(f"vae: latent standard deviation {deviation:.3f}, scaling factor {vae.config.scaling_factor}")
    return vae


@torch.no_grad()
def round_trip(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """uint8 (N, 3, 64, 64) -> the same pictures through encoder (mean) and decoder, uint8."""
    parts = []
    for start in range(0, len(pictures), batch):
        latents = vae.encode(to_float(pictures[start : start + batch]).to(vae.device)).latent_dist.mode()
        parts.append(to_bytes(vae.decode(latents).sample.float()).cpu())
    return torch.cat(parts)


def psnr(a: Tensor, b: Tensor) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB (uint8 (N, 3, H, W))."""
    error = (a.float() - b.float()).square().flatten(1).mean(1).clamp_min(1e-3)
    return float((10 * torch.log10(255**2 / error)).mean())
