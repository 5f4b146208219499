"""emoji-wan, a small real `WanPipeline`: its autoencoder, transformer and text encoder, trained on moving emoji; export and figures."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from ..emoji import motion, motion_judge, scenes
from ..emoji.motion_judge import FIELDS
from .cards import LICENCE, MADE
from .common import Stage, console, keep_freed_memory, make_accelerator, step_generator
from .export import load_as_fp32, recipe_values, remarks, replacing, save_figures, score_table, versions
from .pool import load_pool
from .recipe import hardware, needs_artwork
from .wan_measure import POSITIONS, check_judge, evaluate
from .wan_vae import CHANNELS, encode_clips, note_statistics, train_vae

BATCH = 64


TEXT_WIDTH = 128


CAPTION_DROPOUT = 0.1


def build_tokenizer() -> T5Tokenizer:
    """T5's tokenizer with a vocabulary in which every word of the captions is one token; other words fall apart into letters."""
    captions = (motion.fill(template, labels) for labels in motion.split()[0] for template, _ in motion.TEMPLATES)
    words = sorted({word for text in captions for word in re.findall("[a-z]+", text)})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), *((letter, -9.0) for letter in letters)]
    vocabulary = [*pieces, *((f"▁{word}", -3.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=POSITIONS)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """An untrained text encoder of two layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """An untrained transformer of 3.9 M parameters; a clip is 3 x 4 x 4 tokens."""
    return WanTransformer3DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        rope_max_seq_len=128,
    )


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps from sigma 1 (pure noise) down, closer together where noisy, as Wan does at low resolution."""
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def draw_sigmas(generator: torch.Generator, progress: float) -> Tensor:
    """(BATCH,) noise levels, spread evenly but for a shift to the noisy end; in the first half of the training a larger one.

    The same share of the steps is then as noisy as in the training of emoji-sd: motion and background are decided there.
    """
    u = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
    shift = 4.0 if progress < 0.5 else 2.5
    return (shift * u / (1 + (shift - 1) * u)).clamp_min(1e-3)


def loss_weight(sigma: Tensor, progress: float) -> Tensor:
    """Weight of the squared error of the velocity, which is that of the clean latents divided by sigma squared.

    The error of the clean latents gets the weights of emoji-sd, see `unet.loss_weight`.
    """
    snr = ((1 - sigma) / sigma).square()
    return (snr.clamp(1, 5) if progress < 0.5 else (10 * snr).clamp(1, 20)) * sigma.square()


def train_transformer(
    vae: AutoencoderKLWan, latents: Tensor, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> tuple[WanTransformer3DModel, UMT5EncoderModel, T5Tokenizer]:
    """The trained transformer and text encoder (averaged weights, fp32) and their tokenizer."""
    torch.manual_seed(seed + 4)
    tokenizer = build_tokenizer()
    transformer, text_encoder = build_transformer(), build_text_encoder(tokenizer)
    device = accelerator.device
    labels = [motion.draw_clip(seed, i).labels for i in range(latents.shape[1])]
    means, deviations = latents
    center, spread = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))

    @cache
    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, padding="max_length", max_length=POSITIONS, truncation=True).input_ids
        return ids

    def loss(step: int) -> Tensor:
        progress = step / steps
        generator, rng = step_generator(seed + 4, step), np.random.default_rng([seed, step, 4])
        index = torch.randint(len(labels), (BATCH,), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT
        captions = ["" if d else motion.caption(labels[i], rng) for i, d in zip(index.tolist(), dropped.tolist(), strict=True)]
        tokens = torch.tensor([tokenize(text) for text in captions], device=device)
        mean, deviation = means[index].float(), deviations[index].float()
        clean = (mean + deviation * torch.randn(mean.shape, generator=generator) - center) / spread
        noise = torch.randn(clean.shape, generator=generator)
        sigma = draw_sigmas(generator, progress)
        s = sigma.view(-1, 1, 1, 1, 1)
        noisy, velocity = (1 - s) * clean + s * noise, noise - clean
        mask = tokens != tokenizer.pad_token_id
        hidden = text_encoder(tokens, mask).last_hidden_state * mask.unsqueeze(-1)  # zeros behind the caption, as in WanPipeline
        with plain_attention(device):
            out = transformer(noisy.to(device), 1000 * sigma.to(device), hidden).sample
        return (loss_weight(s, progress).to(device) * (out.float() - velocity.to(device)).square()).mean()

    stage = Stage("wan-transformer", folder, {"transformer": transformer, "text_encoder": text_encoder}, steps, 1e-3, accelerator)
    averages = stage.run(loss)
    transformer.load_state_dict(averages["transformer"])
    text_encoder.load_state_dict(averages["text_encoder"])
    return transformer.cpu().eval(), text_encoder.cpu().eval(), tokenizer


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """On a CPU, attention by plain matrix products: the backward pass of the fused kernel took half of a step."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()


def export(folder: Path, vae: AutoencoderKLWan, transformer: WanTransformer3DModel, text: UMT5EncoderModel, tokenizer: T5Tokenizer) -> None:
    """Replace `folder` by the checkpoint, weights in fp16; the parts given are rounded to it, and are fp32 again afterwards."""
    pipe = WanPipeline(tokenizer=tokenizer, text_encoder=text, vae=vae, scheduler=build_scheduler(), transformer=transformer)
    with replacing(folder) as fresh:
        pipe.to(dtype=torch.float16).save_pretrained(fresh)
        pipe.to(dtype=torch.float32)
        load_as_fp32(fresh / "text_encoder" / "config.json")


def write_card(folder: Path, recipe: dict[str, Any], result: dict[str, Any], notes: str = "") -> None:
    """README.md with the recipe, the true figures and a person's `notes`; the figures as data in evaluation.json."""
    save_figures(folder, {"recipe": recipe, **result})

    def table(rows: dict[str, dict[str, float]], fields: Sequence[str]) -> str:
        return "\n".join(f"| {what} | " + " | ".join(f"{100 * row[field]:.1f} %" for field in fields) + " |" for what, row in rows.items())

    training, held_out = motion.split()
    card = (CARD + LICENCE).format(
        scores=score_table(result["scores"]), judged=table(recipe["judge"], FIELDS),
        sweep=table(result["guidance_sweep"], (*FIELDS, "all four")),
        **recipe_values(recipe), videos=recipe["videos"], psnr=recipe["vae_psnr_db"],
        prompts=result["prompts"], guidance=result["guidance"],
        seconds=result["seconds_per_clip"], diversity=result["diversity_rms"]["generated"],
        true_diversity=result["diversity_rms"]["true_renders"], total=len(training) + len(held_out), held_out=len(held_out),
        objects=", ".join(scenes.OBJECTS), backgrounds=", ".join(scenes.BACKGROUNDS), sizes=", ".join(scenes.SIZES),
        motions=", ".join(f'"{phrase}"' for phrase in motion.MOTION_PHRASES.values()), positions=POSITIONS,
        notes=remarks(notes),
    )  # fmt: skip
    (folder / "README.md").write_text(card)


def emoji_wan(
    out: Annotated[Path, typer.Option(help="Working folder; the checkpoint is written to OUT/emoji-wan.")],
    steps_pictures: Annotated[int, typer.Option(help="Steps of the autoencoder on pictures.", min=1)] = 5000,
    steps_clips: Annotated[int, typer.Option(help="Steps of the autoencoder on clips.", min=1)] = 2000,
    steps_transformer: Annotated[int, typer.Option(min=1)] = 3600,
    pictures: Annotated[int, typer.Option(help="Rendered training scenes, as of emoji-sd.", min=1000)] = 40_000,
    videos: Annotated[int, typer.Option(help="Training clips whose latents are kept.", min=64)] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of clips, weights and noise.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure.", min=1)] = 96,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0: the best of a sweep.")] = 0.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
) -> None:
    """Train autoencoder, transformer and text encoder, export, measure. The same command goes on where it stopped."""
    began = time.perf_counter()
    keep_freed_memory()
    accelerator = make_accelerator(device)
    with needs_artwork():
        pool = load_pool(out / "pool", pictures, seed)
        scenes.load_artwork()
    state, folder = out / "state", out / "emoji-wan"
    vae = train_vae(pool, state, (steps_pictures, steps_clips), seed, accelerator)
    latents = encode_clips(vae, videos, state / f"wan-latents-{videos}-{seed}-{steps_pictures}-{steps_clips}.pt", seed, accelerator)
    note_statistics(vae, latents)
    judged, decibels = check_judge(vae, motion_judge.load_bundled(), seed)
    console.print(f"wan-vae: {decibels} dB; judge {judged}", highlight=False)
    transformer, text, tokenizer = train_transformer(vae, latents, state, steps_transformer, seed, accelerator)
    export(folder, vae.cpu(), transformer, text, tokenizer)
    console.print(f"exported {folder}; {time.perf_counter() - began:.0f} s in this call")
    parts = {"transformer": transformer, "autoencoder": vae, "text encoder": text}
    times = json.loads((state / "seconds.json").read_text())
    recipe: dict[str, Any] = {
        "command": (
            f"python -m diffgraft_checkpoints.train emoji-wan --out DIR --steps-pictures {steps_pictures} --steps-clips {steps_clips} "
            f"--steps-transformer {steps_transformer} --pictures {pictures} --videos {videos} --seed {seed} --device {device}"
        ),
        "stages": {name: times[name] for name in ("wan-vae-pictures", "wan-vae-clips", "wan-transformer")},
        "videos": videos,
        "hardware": hardware(accelerator.device),
        "versions": versions(),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in parts.items()},
        "vae_psnr_db": decibels,
        "judge": judged,
    }
    result = evaluate(folder, folder / "grids", prompts, guidance)
    write_card(folder, recipe, result, notes.read_text() if notes else "")
    for name, row in result["scores"].items():
        console.print(f"{name}: {row['right']} / {row['total']}, 95 % interval {row['wilson_95']}", highlight=False)


CARD = (
    """---
license: other
license_name: apache-2.0-and-ofl-1.1
pipeline_tag: text-to-video
library_name: diffusers
---
# emoji-wan

A small real text-to-video checkpoint: a standard `WanPipeline` that draws 9 frames of 64 x 64 pixels of one emoji that moves over
a plain background. Its prompts say four things that can be measured exactly (object, background colour, size and motion); how well
it follows each is in the table below. It was trained from scratch by diffgraft's own script, to try plugins on real videos without
a download and without a GPU. It is not meant for anything else.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/to/emoji-wan")
prompt = "a small apple moves to the left on a blue background"
frames = pipe(prompt, num_frames=9, height=64, width=64, max_sequence_length={positions}, guidance_scale={guidance}).frames[0]
```

`max_sequence_length={positions}` is needed: `WanPipeline` pads prompts with zeros up to this length, its transformer attends to the
padding too, and this one has only seen {positions} tokens.

Prompts: "a {{size}} {{object}} {{motion}} on a {{background}} background", "{{size}} {{object}}, moving to the left, {{background}}
background", "a {{background}} background with a {{size}} {{object}} that {{motion}}"; size, motion and background may be left out.

- objects: {objects}
- backgrounds: {backgrounds}
- sizes: {sizes}
- motions: {motions}

## Figures on held-out combinations

{held_out} of the {total} combinations of object, background, size and motion were never shown in training. {prompts} of them, 50
Euler steps, guidance {guidance}, prompt i with seed i, fp16 weights loaded as fp32:

| | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between seeds of one prompt; {true_diversity} between true
  renders of one caption.
- {seconds} s a clip (batches of 16) on the machine below.

Guidance scales on other held-out combinations (32 prompts):

| guidance | object | background | size | motion | all four |
|---|---|---|---|---|---|
{sweep}

The judge is `diffgraft_checkpoints.emoji.motion_judge`: object, background and size by the network of emoji-sd's judge over all frames,
the motion by the object's centres in the first, middle and last frames. Its own accuracy on held-out true renders and on their
round trips through the autoencoder:

| | object | background | size | motion |
|---|---|---|---|---|
{judged}

"""
    + MADE
    + """
- Data: {videos} rendered clips of Noto Color Emoji for the transformer (their latents are kept), ever new ones for the autoencoder:
  straight ways at free places, mirrored, rotated by up to 25 degrees, size and background level jittered; seven caption templates.
- Autoencoder: 9 x 64 x 64 x 3 to 3 x 8 x 8 x 22, L1 + MSE + gradient + KL loss on crops of pictures first, then on clips; round trip
  of held-out clips {psnr} dB.
- Transformer and text encoder: trained jointly from scratch by flow matching, AdamW (learning rate 1e-3, cosine), batch 64, bf16
  autocast, 10 % caption dropout, averaged weights (.998). Noise levels shifted by 4, then 2.5; the error of the clean latents weighted
  by clamp(SNR, 1, 5) in the first half of the steps and by clamp(10 SNR, 1, 20) in the second.
- Six of the 22 latent channels hold where a latent is (across, down and time, twice): Wan's transformer sees only distances between
  tokens, and cannot tell in noise which side is which; a ramp it can draw. The autoencoder neither writes nor reads these channels.

## Limits

One object a clip, straight motion, only the words above; 9 frames of 64 x 64, softer than the artwork; text to video only, as the
encoder leaves six channels empty. The judge is more lenient than
a person about fine detail, so look at the clips in `grids/` too.

"""
)
