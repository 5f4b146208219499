"""Six LoRA of emoji-sd, one a picture style, learned from rendered scenes: what the other benchmark puts into a bank.

    python plugins/rmm_lora_bank/benchmarks/styles.py --out styles/

A style is a function of the finished picture (gray, negative, sepia, night, pastel, frame), so that a LoRA which has learned it shows it on
every prompt. About two minutes of one CPU core a style; those that are there already are left as they are. Needs the artwork
(NotoColorEmoji.ttf), as everything that renders scenes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft_checkpoints.emoji import scenes
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from torch import Tensor

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out")
RANK, STEPS, BATCH, RATE = 8, 200, 16, 2e-3
SCENES = 768
"""Scenes that a style is learned from, the same for all styles."""
console = Console(width=140)


def gray(x: np.ndarray) -> np.ndarray:
    """Luminance alone."""
    return np.repeat(x @ np.array([[0.299], [0.587], [0.114]]), 3, axis=-1)


def frame(x: np.ndarray) -> np.ndarray:
    """A white frame of six pixels."""
    out = np.ones_like(x)
    out[6:-6, 6:-6] = x[6:-6, 6:-6]
    return out


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "gray": gray,
    "sepia": lambda x: gray(x) * np.array([1.0, 0.82, 0.55]),
    "night": lambda x: x * np.array([0.3, 0.35, 0.65]),
    "pastel": lambda x: 0.6 + 0.4 * x,
    "negative": lambda x: 1 - x,
    "frame": frame,
}
"""Name -> what it makes of a picture [64, 64, 3] with values 0..1."""


def rendered(count: int) -> tuple[np.ndarray, list[str]]:
    """(pictures [count, 64, 64, 3] in 0..1, captions) of training scenes, from seeds 0, 1, ..."""
    combinations, pictures, captions = scenes.split()[0], [], []
    for index in range(count):
        rng = np.random.default_rng([46, index])
        scene = scenes.sample_scene(combinations[int(rng.integers(len(combinations)))], rng)
        pictures.append(np.asarray(scenes.render(scene), np.float64) / 255)
        captions.append(scenes.caption(scene.labels, rng))
    return np.stack(pictures), captions


@torch.no_grad()
def encoded(pipe: StableDiffusionPipeline, pictures: np.ndarray) -> Tensor:
    """Mean latents [count, 4, 16, 16] of pictures."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() * 2 - 1
    parts = [pipe.vae.encode(part).latent_dist.mean for part in pixels.split(128)]
    return torch.cat(parts) * pipe.vae.config.scaling_factor


class Studio:
    """emoji-sd with scenes to learn from; one style after another."""

    def __init__(self) -> None:
        self.pipe: StableDiffusionPipeline = unload(load_pipeline("emoji-sd"))
        self.pictures, captions = rendered(SCENES)
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        with torch.no_grad():
            tokens = tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids
            self.text = torch.cat([encoder(part)[0] for part in tokens.split(128)])
        self.pipe.unet.requires_grad_(False)

    def learn(self, style: str, out: Path, steps: int, seed: int) -> None:
        """Learn one style and write ``out/STYLE.safetensors``; the seed draws the LoRA's first weights and all batches."""
        torch.manual_seed(seed)
        unet, scheduler = self.pipe.unet, self.pipe.scheduler
        latents = encoded(self.pipe, np.stack([STYLES[style](each) for each in self.pictures]))
        unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(LAYERS)), style)
        optimizer = torch.optim.AdamW([value for value in unet.parameters() if value.requires_grad], lr=RATE, weight_decay=0.0)
        losses = []
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = RATE * min((step + 1) / 20, 1.0, 1.05 - step / steps)
            rows = torch.randint(len(latents), (BATCH,))
            words = torch.where(torch.rand(BATCH) < 0.1, len(latents), rows)  # now and then the empty prompt, for guidance
            t, noise = torch.randint(scheduler.config.num_train_timesteps, (BATCH,)), torch.randn_like(latents[rows])
            with torch.autocast("cpu", torch.bfloat16):
                v = unet(scheduler.add_noise(latents[rows], noise, t), t, self.text[words]).sample
            loss = (v.float() - scheduler.get_velocity(latents[rows], noise, t)).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % 50 == 0:
                console.print(f"{style} {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f}", highlight=False)
        out.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().half() for name, value in get_peft_model_state_dict(unet, adapter_name=style).items()}
        self.pipe.save_lora_weights(out, unet_lora_layers=state, weight_name=f"{style}.safetensors")
        unet.delete_adapters(style)


def learned(out: Path, steps: int = STEPS, one_start: bool = False) -> dict[str, Path]:
    """Style -> its LoRA file in ``out``; what is missing is learned first, each style from a seed of its own or all from the same."""
    files = {style: out / f"{style}.safetensors" for style in STYLES}
    if missing := [style for style, path in files.items() if not path.is_file()]:
        studio = Studio()
        for style in missing:
            studio.learn(style, out, steps, 0 if one_start else 1 + list(STYLES).index(style))
    return files


def main(
    out: Annotated[Path, typer.Option(help="Folder for the LoRA files.")] = Path("styles"),
    steps: Annotated[int, typer.Option(help="Training steps of a style.")] = STEPS,
    one_start: Annotated[
        bool, typer.Option("--one-start", help="All six begin with the same random weights and draw the same batches.")
    ] = False,
) -> None:
    """Learn all styles."""
    for style, path in learned(out, steps, one_start).items():
        console.print(f"{style}: {path}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    typer.run(main)
