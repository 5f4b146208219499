"""emoji-wan, stage 1: the autoencoder of clips."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from rich.progress import track
from torch import Tensor

from ..emoji import motion
from .common import Stage, console, step_generator, write_atomic
from .pool import Pool, to_bytes, to_float
from .vae import KL_WEIGHT, crops, reconstruction_loss

CONTENT, COORDINATES = 16, 6
CHANNELS = CONTENT + COORDINATES
"""Latent channels: for the pixels, and for where a latent is; see `coordinates`."""
PICTURE_BATCH, CLIP_BATCH = 24, 4
CLIP_SEED = 1_000_003
"""Added to the seed for the clips that the autoencoder sees: other ones than the transformer's, and each only once."""


def build_vae() -> AutoencoderKLWan:
    """An untrained autoencoder of 2.7 M parameters: 9 x 64 x 64 x 3 pixels to 3 x 8 x 8 x 22 latents.

    In the form of Wan 2.2 (pixels in blocks of 2 x 2, shortcuts past every level): its convolutions never run at full size, and
    the shortcuts carry a coarse picture from the first step on. The channels of `coordinates` it neither writes nor reads: the
    encoder gives 0 there, the decoder's first weights for them are 0, and as `train_vae` leaves these channels out, both remain.
    """
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    with torch.no_grad():
        vae.quant_conv.weight[CONTENT:CHANNELS] = 0
        vae.quant_conv.bias[CONTENT:CHANNELS] = 0
        vae.post_quant_conv.weight[:, CONTENT:] = 0
    return vae


def coordinates(frames: int, height: int, width: int) -> Tensor:
    """(6, frames, height, width): across, down and time of each latent, twice, about -1..1: what the last latent channels hold.

    Wan's transformer sees only how far tokens are from each other (rotary embeddings; text has no place), so in noise it cannot
    tell left from right nor the middle from the edge. A ramp of known slope and mean it can draw even so, each token by its
    neighbours, and with it everything else has a place: of four clips that a small transformer learned by heart (700 steps), three came
    back in their places; without the ramps one did, and the others as fragments.
    """
    across = torch.linspace(-1, 1, width).expand(frames, height, width)
    down = torch.linspace(-1, 1, height).view(-1, 1).expand(frames, height, width)
    moment = (torch.arange(frames, dtype=torch.float32) - 1).view(-1, 1, 1).expand(frames, height, width)
    return torch.stack([across, down, moment] * (COORDINATES // 3))


def render_clips(clips: Sequence[motion.Clip]) -> Tensor:
    """Clips as uint8 (N, 3, 9, 64, 64)."""
    return torch.from_numpy(np.stack([motion.to_array(motion.render_clip(clip)) for clip in clips])).permute(0, 4, 1, 2, 3).contiguous()


def train_vae(pool: Pool, folder: Path, steps: tuple[int, int], seed: int, accelerator: Accelerator) -> AutoencoderKLWan:
    """The trained autoencoder (averaged weights, fp32): `steps[0]` on crops of pictures, then `steps[1]` on ever new clips.

    Most of what it must learn is how emoji look, and a crop costs a thirtieth of a clip. The first half of the steps on clips
    sees 5 frames of each (one and four: all that the convolutions tell apart but for the third group), the second half all 9.
    """
    torch.manual_seed(seed + 3)
    vae = build_vae()

    def loss(target: Tensor, generator: torch.Generator) -> Tensor:
        target = target.to(accelerator.device)
        posterior = vae.encode(target).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(accelerator.device)
        mean, logvar = posterior.mean.float()[:, :CONTENT], posterior.logvar.float()[:, :CONTENT]
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        latents = F.pad(mean + (0.5 * logvar).exp() * noise[:, :CONTENT], (0, 0) * 3 + (0, COORDINATES))
        return reconstruction_loss(vae.decode(latents).sample, target) + KL_WEIGHT * kl

    def picture_loss(step: int) -> Tensor:
        generator = step_generator(seed + 3, step)
        return loss(crops(pool, PICTURE_BATCH, generator).unsqueeze(2), generator)

    def clip_loss(step: int) -> Tensor:
        generator = step_generator(seed + 3, steps[0] + step)
        frames = 5 if step < steps[1] // 2 else motion.FRAMES
        clips = [motion.draw_clip(seed + CLIP_SEED, step * CLIP_BATCH + i) for i in range(CLIP_BATCH)]
        return loss(to_float(render_clips(clips)[:, :, :frames]), generator)

    pictures = Stage("wan-vae-pictures", folder, {"vae": vae}, steps[0], 2e-3, accelerator, ema=0.998)
    with flat_convolutions(vae):
        averages = pictures.run(picture_loss)
    vae.load_state_dict(averages["vae"])
    look_at_the_present(vae)
    clips = Stage("wan-vae-clips", folder, {"vae": vae}, steps[1], 1e-3, accelerator, ema=0.998)
    vae.load_state_dict(clips.run(clip_loss)["vae"])
    return vae.eval()


@contextlib.contextmanager
def flat_convolutions(vae: AutoencoderKLWan) -> Iterator[None]:
    """Inside, clips of one frame take two-dimensional convolutions: the same numbers, and a training step at 60 % of the time.

    A causal convolution sees zeros before the first frame, so only the newest slice of its weights counts there.
    """
    convolutions = [module for module in vae.modules() if isinstance(module, WanCausalConv3d)]

    def forward(module: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        if x.shape[2] > 1 or cache_x is not None:
            return WanCausalConv3d.forward(module, x, cache_x)
        padded = F.pad(x[:, :, 0], module._padding[:4])
        return F.conv2d(padded, module.weight[:, :, -1], module.bias, module.stride[1:]).unsqueeze(2)

    for module in convolutions:
        module.forward = partial(forward, module)
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


@torch.no_grad()
def look_at_the_present(vae: AutoencoderKLWan) -> None:
    """Zero the weights for earlier frames, which pictures do not train, and let the convolutions between frame rates copy.

    Then the autoencoder takes each group of frames of a clip for a picture, and has only the differences to learn.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, WanCausalConv3d) or module.kernel_size[0] == 1:
            continue
        module.weight[:, :, :-1] = 0
        if name.endswith("time_conv"):
            copies = module.out_channels // module.in_channels
            module.weight[:, :, -1, 0, 0] = torch.eye(module.in_channels, device=module.weight.device).repeat(copies, 1)
            module.bias.zero_()


@torch.no_grad()
def encode_clips(vae: AutoencoderKLWan, count: int, path: Path, seed: int, accelerator: Accelerator, batch: int = 32) -> Tensor:
    """Means and deviations of the latents of the training clips, (2, N, 22, 3, 8, 8) fp16, kept in `path`; the clips are not.

    The last channels are the `coordinates`, with deviation 0.
    """
    if not path.exists():
        parts = []
        for start in track(range(0, count, batch), f"encoding {count} clips", console=console, disable=not console.is_terminal):
            clips = [motion.draw_clip(seed, i) for i in range(start, min(start + batch, count))]
            with accelerator.autocast():
                posterior = vae.encode(to_float(render_clips(clips)).to(vae.device)).latent_dist
            both = torch.stack([posterior.mean, posterior.std]).float().cpu()
            both[0, :, CONTENT:], both[1, :, CONTENT:] = coordinates(*both.shape[3:]), 0.0
            parts.append(both.half())
        write_atomic(path, lambda p: torch.save(torch.cat(parts, dim=1), p))
    return torch.load(path, weights_only=True)


def note_statistics(vae: AutoencoderKLWan, latents: Tensor) -> None:
    """Write mean and standard deviation of each latent channel into the autoencoder's config, as `WanPipeline` expects."""
    mean, deviation = latents.float()
    spread = (mean.var(dim=(0, 2, 3, 4)) + deviation.square().mean(dim=(0, 2, 3, 4))).sqrt()
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in mean.mean(dim=(0, 2, 3, 4)).tolist()], latents_std=[round(v, 4) for v in spread.tolist()]
    )


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, clips: Tensor, batch: int = 8) -> Tensor:
    """uint8 (N, 3, F, H, W) -> the same clips through encoder (mean) and decoder, uint8."""
    parts = []
    for part in clips.split(batch):
        out = vae.decode(vae.encode(to_float(part).to(vae.device)).latent_dist.mode()).sample
        parts.append(to_bytes(out.float()).cpu())
    return torch.cat(parts)
