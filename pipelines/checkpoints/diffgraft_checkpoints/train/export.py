"""Writing the trained parts as one standard diffusers folder: fp16 weights, judge, model card, licence notices."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..emoji import scenes
from ..emoji.judge import FIELDS, Judge
from .evaluate import HELD_OUT_PAIRS
from .unet import build_scheduler

NOTICES = Path(__file__).parent / "notices"


def stable_diffusion(
    vae: AutoencoderKL, unet: UNet2DConditionModel, text: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """The parts as a pipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=tokenizer,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(folder: Path, pipe: DiffusionPipeline, judge: Judge | None = None, artwork: bool = True) -> None:
    """Replace `folder` by the checkpoint in fp16, with the notices of the artwork if it shows that; `pipe` is fp32 afterwards as before."""
    with replacing(folder, artwork) as fresh:
        pipe.to(dtype=torch.float16).save_pretrained(fresh)
        pipe.to(dtype=torch.float32)
        for part in ("text_encoder", "model"):
            for config in fresh.glob(f"{part}/config.json"):
                load_as_fp32(config)
        for config in (fresh / "model_index.json", *fresh.glob("*/config.json")):
            forget_origin(config)
        if "tokenizer" in pipe.components:
            pipe.tokenizer.backend_tokenizer.model.save(str(fresh / "tokenizer"))
        if judge is not None:
            judge.save_pretrained(fresh / "judge")


def export_lora(folder: Path, lora: dict[str, Tensor], scheduler: LCMScheduler) -> None:
    """Replace `folder` by a LoRA in fp16 and the scheduler that it wants."""
    with replacing(folder) as fresh:
        StableDiffusionPipeline.save_lora_weights(fresh, unet_lora_layers={name: part.half().contiguous() for name, part in lora.items()})
        scheduler.save_pretrained(fresh / "scheduler")


@contextmanager
def replacing(folder: Path, artwork: bool = True) -> Iterator[Path]:
    """A fresh folder that takes the place of `folder` at the end, with the licence notices in it."""
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for notice in sorted(NOTICES.iterdir() if artwork else [NOTICES / "LICENSE-APACHE-2.0.txt"]):
        shutil.copy(notice, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)


def load_as_fp32(config: Path) -> None:
    """Have transformers load fp16 files as fp32 unless told otherwise, as diffusers does with its own parts."""
    values = json.loads(config.read_text())
    values.pop("torch_dtype", None)
    config.write_text(json.dumps({**values, "dtype": "float32"}, indent=2, sort_keys=True) + "\n")


def forget_origin(config: Path) -> None:
    """Take out where on this machine the part was loaded from."""
    values = json.loads(config.read_text())
    if values.pop("_name_or_path", None):
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def versions() -> dict[str, str]:
    """The software that the figures were made with."""
    packages = {m.__name__: m.__version__ for m in (torch, diffusers, transformers, accelerate)}
    return {"python": platform.python_version(), **packages}


def write_card(
    folder: Path, template: str, recipe: dict[str, Any], judge: Judge, result: dict[str, Any], notes: str = "", **more: Any
) -> None:
    """README.md from a template with the recipe, the true figures and a person's `notes`; the figures as data in evaluation.json."""
    save_figures(folder, {"recipe": recipe, "judge": judge.config.accuracy, **result})
    judged = "\n".join(
        f"| {what} | " + " | ".join(f"{100 * row[f]:.1f} %" if f in row else "" for f in FIELDS) + " |"
        for what, row in judge.config.accuracy.items()
    )
    sweep = "\n".join(
        f"| {guidance} | " + " | ".join(f"{100 * row[f]:.1f} %" for f in (*FIELDS, "all four")) + " |"
        for guidance, row in result.get("guidance_sweep", {}).items()
    )
    training, held_out = scenes.split()
    tables = {name: score_table(rows) for name, rows in result.items() if name in ("scores", "pairs", "half_size")}
    card = template.format(
        **tables, **more, **recipe_values(recipe), judged=judged, sweep=sweep,
        pair_count=recipe.get("pairs"), pair_prompts=HELD_OUT_PAIRS, pairs_held_out=len(scenes.held_out_pairs()),
        prompts=result["prompts"], steps=result["steps"], guidance=result["guidance"], seconds=result["seconds_per_picture"],
        objects=", ".join(scenes.OBJECTS), backgrounds=", ".join(scenes.BACKGROUNDS), sizes=", ".join(scenes.SIZES),
        places=", ".join(scenes.PLACES), total=len(training) + len(held_out), held_out=len(held_out),
        diversity=result["diversity_rms"]["generated"], true_diversity=result["diversity_rms"]["true_renders"],
        frechet=result["frechet_to_renders"], true_frechet=result["frechet_renders_to_renders"],
        psnr=recipe.get("vae_psnr_db"), scaling=recipe.get("scaling_factor"), notes=remarks(notes),
    )  # fmt: skip
    (folder / "README.md").write_text(card)


def recipe_values(recipe: dict[str, Any]) -> dict[str, Any]:
    """What every card says of a recipe, by the names of the templates."""
    return {
        "command": recipe["command"],
        "hardware": recipe["hardware"],
        "stages": "\n".join(f"| {name} | {row['steps']} | {row['seconds']} s |" for name, row in recipe["stages"].items()),
        "parts": ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in recipe["parameters"].items()),
        "versions": ", ".join(f"{k} {v}" for k, v in recipe["versions"].items()),
        **({"scene_count": recipe["scenes"]} if "scenes" in recipe else {}),
    }


def remarks(notes: str) -> str:
    """A person's notes as a paragraph of a card, or nothing."""
    return f"{notes.strip()}\n\n" if notes else ""


def save_figures(folder: Path, data: dict[str, Any]) -> None:
    """What the figures of a card come from, as evaluation.json: before the card, as measuring takes longer than writing."""
    (folder / "evaluation.json").write_text(json.dumps(data, indent=1) + "\n")


def score_table(scores: dict[str, dict[str, Any]]) -> str:
    """The rows of `evaluate.tally` as Markdown."""
    return "\n".join(
        f"| {name} | {row['right']} / {row['total']} | {100 * row['share']:.1f} % "
        f"| {100 * row['wilson_95'][0]:.1f} - {100 * row['wilson_95'][1]:.1f} % |"
        for name, row in scores.items()
    )
