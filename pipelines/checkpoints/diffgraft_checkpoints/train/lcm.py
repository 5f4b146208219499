"""`emoji-sd-lcm`: a LoRA that lets emoji-sd draw in four steps without guidance, by latent consistency distillation.

Luo et al., "Latent Consistency Models" (arXiv 2310.04378, algorithm 1) and "LCM-LoRA" (arXiv 2311.05556). The student maps any point
of the teacher's guided trajectory to its end: f(x_t, t) is trained to equal f(x_s, s), where x_s is what the guided teacher makes of x_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from .common import Stage
from .pool import Pairs, Pool
from .small import frozen
from .unet import POSITIONS, Batches, build_scheduler

LEARNING_RATE = 3e-4
RANK = 32
SOLVER_STEPS = 50
"""The LCM scheduler's `original_inference_steps`: the steps among which it chooses its timesteps."""
GUIDANCE = 2.0
"""Guidance scale that is distilled into the LoRA: the one that emoji-sd is called with."""
HOPS = 8
"""Consistency is asked of neighbours in the scheduler's eight-step schedule. With neighbours among all 50 steps errors add up over 50 hops:
after 1,200 training steps that student left most of the noise in its pictures."""
TEACHER_STEPS = 2
"""DDIM steps of the teacher from one neighbour to the next."""
HUBER = 0.03
LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


def build_lcm_scheduler() -> LCMScheduler:
    """Four-step sampling on emoji-sd's noise schedule."""
    config = build_scheduler().config
    kept = ("beta_start", "beta_end", "beta_schedule", "clip_sample", "prediction_type", "set_alpha_to_one", "steps_offset")
    return LCMScheduler(**{name: config[name] for name in kept}, original_inference_steps=SOLVER_STEPS)


class Point(NamedTuple):
    """x at timesteps t with signal a = sqrt(abar) and noise s = sqrt(1 - abar), each broadcastable to x."""

    x: Tensor
    t: Tensor
    a: Tensor
    s: Tensor


def clean(point: Point, v: Tensor) -> Tensor:
    """x0 that the prediction v implies."""
    return point.a * point.x - point.s * v


def noise_of(point: Point, v: Tensor) -> Tensor:
    """eps that the prediction v implies."""
    return point.s * point.x + point.a * v


def consistency(point: Point, v: Tensor, scaling: float = 10.0, sigma_data: float = 0.5) -> Tensor:
    """f(x_t, t) = c_skip x_t + c_out x0 (eq. 9), with the LCM scheduler's boundary scalings: f(x_0, 0) = x_0."""
    t = scaling * point.t.view(-1, 1, 1, 1).to(point.x.dtype)
    c_skip = sigma_data**2 / (t**2 + sigma_data**2)
    c_out = t / (t**2 + sigma_data**2).sqrt()
    return c_skip * point.x + c_out * clean(point, v)


def train_lcm(
    pools: Sequence[Pool | Pairs], base: StableDiffusionPipeline, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The LoRA's averaged weights, in peft's names; the U-Net of `base` carries it afterwards."""
    torch.manual_seed(seed + 5)
    device = accelerator.device
    batches = Batches(pools, base.vae, base.tokenizer, folder, seed + 5, device)
    unet, text_encoder = frozen(base, device)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)))
    empty = torch.tensor([batches.tokenize("")], device=device)
    alphas = batches.alphas.to(device)
    scheduler = build_lcm_scheduler()
    scheduler.set_timesteps(HOPS)
    grid = torch.cat([scheduler.timesteps, torch.tensor([-1])]).to(device)

    def point(x: Tensor, t: Tensor) -> Point:
        alpha = torch.where(t < 0, alphas[0], alphas[t.clamp(min=0)]).view(-1, 1, 1, 1)
        return Point(x, t.clamp(min=0), alpha.sqrt(), (1 - alpha).sqrt())

    def guided(at: Point, hidden: Tensor) -> Tensor:
        """The teacher's prediction, `hidden` being [nothing, prompt]."""
        uncond, cond = unet(at.x.repeat(2, 1, 1, 1), at.t.repeat(2), hidden).sample.float().chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    def loss(step: int) -> Tensor:
        batch = batches.draw(step, 1.0, dropout=0.0)
        half = len(batch.tokens) // 2  # eight forward passes' work a step
        number = (batch.timesteps[:half] * HOPS).div(len(alphas), rounding_mode="floor")
        t, end = grid[HOPS - 1 - number], grid[HOPS - number]
        blank = point(batch.latents[:half], t)
        start = later = blank._replace(x=blank.a * batch.latents[:half] + blank.s * batch.noise[:half])
        with torch.no_grad():
            both = text_encoder(torch.cat([batch.tokens[:half], empty])).last_hidden_state
            hidden, nothing = both[:half], both[half:].expand(half, POSITIONS, -1)
            unet.disable_adapters()
            for part in range(1, TEACHER_STEPS + 1):
                v = guided(later, torch.cat([nothing, hidden]))
                to = point(later.x, t + (end - t) * part // TEACHER_STEPS)
                later = to._replace(x=to.a * clean(later, v) + to.s * noise_of(later, v))
            unet.enable_adapters()
            target = consistency(later, unet(later.x, later.t, hidden).sample.float())
        out = consistency(start, unet(start.x, t, hidden).sample.float())
        return ((out - target).square() + HUBER**2).sqrt().sub(HUBER).mean()

    averages = Stage("lcm", folder, {"unet": unet}, steps, LEARNING_RATE, accelerator, weight_decay=0.0).run(loss)
    unet.load_state_dict(averages["unet"])
    return get_peft_model_state_dict(unet)
