"""Writing the trained parts as one standard diffusers folder: fp16 weights, judge, model card, licence notices."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ..emoji import scenes
from ..emoji.judge import FIELDS, Judge
from .unet import build_scheduler

NOTICES = Path(__file__).parent / "notices"


def export(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    judge: Judge,
) -> None:
    """Replace `folder` by the checkpoint; the parts given are left as they are."""
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=torch.float16).save_pretrained(fresh)
    pipe.to(dtype=torch.float32)
    load_as_fp32(fresh / "text_encoder" / "config.json")
    tokenizer.backend_tokenizer.model.save(str(fresh / "tokenizer"))
    judge.save_pretrained(fresh / "judge")
    for notice in sorted(NOTICES.iterdir()):
        shutil.copy(notice, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def load_as_fp32(config: Path) -> None:
    """Have transformers load fp16 files as fp32 unless told otherwise, as diffusers does with its own parts."""
    values = json.loads(config.read_text())
    values.pop("torch_dtype", None)
    config.write_text(json.dumps({**values, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def versions() -> dict[str, str]:
    """The software that the figures were made with."""
    packages = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, accelerate)}
    return {"python": platform.python_version(), **packages}


def write_card(folder: Path, recipe: dict[str, Any], judge: Judge, result: dict[str, Any], notes: str = "") -> None:
    """README.md with the recipe, the true figures and a person's `notes`; the figures as data in evaluation.json."""
    data = {"recipe": recipe, "judge": judge.config.accuracy, **result}
    (folder / "evaluation.json").write_text(json.dumps(data, indent=1) + "\n")
    scores = "\n".join(
        f"| {name} | {row['right']} / {row['total']} | {100 * row['share']:.1f} % "
        f"| {100 * row['wilson_95'][0]:.1f} - {100 * row['wilson_95'][1]:.1f} % |"
        for name, row in result["scores"].items()
    )
    judged = "\n".join(
        f"| {what} | " + " | ".join(f"{100 * row[f]:.1f} %" if f in row else "" for f in FIELDS) + " |"
        for what, row in judge.config.accuracy.items()
    )
    sweep = "\n".join(
        f"| {guidance} | " + " | ".join(f"{100 * row[f]:.1f} %" for f in (*FIELDS, "all four")) + " |"
        for guidance, row in result["guidance_sweep"].items()
    )
    stages = "\n".join(f"| {name} | {row['steps']} | {row['seconds']} s |" for name, row in recipe["stages"].items())
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in recipe["parameters"].items())
    training, held_out = scenes.split()
    card = CARD.format(
        command=recipe["command"], hardware=recipe["hardware"], stages=stages, parts=parts, scores=scores,
        judged=judged, sweep=sweep, prompts=result["prompts"], guidance=result["guidance"], seconds=result["seconds_per_picture"],
        objects=", ".join(scenes.OBJECTS), backgrounds=", ".join(scenes.BACKGROUNDS), sizes=", ".join(scenes.SIZES),
        places=", ".join(scenes.PLACES), total=len(training) + len(held_out), held_out=len(held_out),
        versions=", ".join(f"{k} {v}" for k, v in recipe["versions"].items()), scene_count=recipe["scenes"],
        diversity=result["diversity_rms"]["generated"], true_diversity=result["diversity_rms"]["true_renders"],
        frechet=result["frechet_to_renders"], true_frechet=result["frechet_renders_to_renders"],
        psnr=recipe["vae_psnr_db"], scaling=recipe["scaling_factor"], notes=f"{notes.strip()}\n\n" if notes else "",
    )  # fmt: skip
    (folder / "README.md").write_text(card)


CARD = """---
license: other
license_name: apache-2.0-and-ofl-1.1
pipeline_tag: text-to-image
library_name: diffusers
---
# emoji-sd

A small real text-to-image checkpoint: a standard `StableDiffusionPipeline` that draws 64 x 64 pictures of one emoji on
a plain background. Its prompts say four things that can be measured exactly (object, background colour, size and place);
how well it follows each is in the table below. It was trained from scratch by diffgraft's own script, to try plugins on
real pictures without a download and without a GPU. It is not meant for anything else.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("path/to/emoji-sd")
image = pipe("a small apple on the left on a blue background", guidance_scale={guidance}).images[0]
```

Prompts: "a {{size}} {{object}} {{place}} on a {{background}} background", "{{size}} {{object}}, {{place}},
{{background}} background", "a {{background}} background with a {{size}} {{object}} {{place}}"; size, place and
background may be left out.

- objects: {objects}
- backgrounds: {backgrounds}
- sizes: {sizes}
- places: {places} ("on the left", "on the right", "at the top", "at the bottom", "in the center")

## Figures on held-out combinations

{held_out} of the {total} combinations of object, background, size and place were never shown in training. {prompts} of
them, 50-step DDIM, guidance {guidance}, prompt i with seed i, fp16 weights loaded as fp32, judged by `judge/`:

| | right | share | 95 % Wilson interval |
|---|---|---|---|
{scores}

- Diversity: {diversity} mean pairwise RMS pixel difference (0..255) between seeds of one prompt; {true_diversity}
  between true renders of one caption.
- Frechet distance of judge features to true renders of the same captions: {frechet} ({true_frechet} between two sets of
  true renders).
- {seconds} s a picture (batches of 16) on the machine below.

Guidance scales on other held-out combinations (64 prompts):

| guidance | object | background | size | place | all four |
|---|---|---|---|---|---|
{sweep}

The judge itself, on 1,000 held-out true renders, on their round trips through the autoencoder, and on renders whose
object was scrambled or melted ("other" is the right answer):

| | object | background | size | place |
|---|---|---|---|---|
{judged}

{notes}## Recipe

Command: `{command}`

| stage | steps | time |
|---|---|---|
{stages}

Hardware: {hardware}. Versions: {versions}. Parameters: {parts}.

- Data: {scene_count} rendered scenes of Noto Color Emoji: free places, mirrored, rotated by up to 25 degrees, size and
  background level jittered; captions from eight templates.
- Autoencoder: 64 x 64 x 3 to 16 x 16 x 4, L1 + MSE + gradient + KL loss on 32 px crops around the object; round trip of
  held-out scenes {psnr} dB; scaling factor {scaling}.
- Judge: a convolutional classifier on renders, round trips, blur, noise and broken objects.
- U-Net and text encoder: trained jointly from scratch, AdamW (learning rate 1e-3, cosine), batch 64, bf16 autocast, 10 %
  caption dropout, averaged weights (.998). v-prediction; Stable Diffusion's schedule with beta_end .02, so that the last
  timestep shows nothing of the picture. First half of the steps: timesteps 1000 u^0.6, error of the clean latents weighted by
  clamp(SNR, 1, 5), for background, size and place; second half: uniform timesteps and clamp(10 SNR, 1, 20), for shapes. The
  caption goes in by cross-attention and joins the time embedding (`addition_embed_type="text"`, as in DeepFloyd IF).
- Between 15 and 40 % of the steps the training latents carry a slope (brighter to the right and to the bottom, fading out).
  Without it the words for left, right, top and bottom had no effect after 1,250 steps: the scenes are symmetric, so nothing
  else teaches the U-Net which side is which. 500 steps after it began, all four did what they say.

## Limits

One object a picture; only the words above; 64 x 64 pixels, softer than the artwork (small objects most of all). The
judge sees what it was trained on: it is more lenient than a person about fine detail, so look at the pictures too.

## Licence of the artwork

Trained on, and drawing, Noto Emoji (Copyright 2013-2017 Google Inc., Arjen Nienhuis): sources Apache-2.0, font SIL Open
Font License 1.1. Both notices lie beside the weights: `LICENSE-APACHE-2.0.txt`, `LICENSE-OFL-1.1.txt`,
`NOTICE-noto-emoji.txt`.
"""
