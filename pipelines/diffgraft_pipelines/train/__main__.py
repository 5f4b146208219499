"""`python -m diffgraft_pipelines.train emoji-sd --out DIR`: train the bundled checkpoint from scratch."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..emoji.judge import FIELDS, Judge
from ..emoji.scenes import ArtworkMissing
from . import evaluate as measuring
from . import export as exporting
from . import judge as judge_stage
from . import unet as unet_stage
from . import vae as vae_stage
from .common import console, keep_freed_memory, make_accelerator
from .pool import load_pool

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

HELD_OUT_SCENES = 1000
GUIDANCES = (2.0, 3.0, 5.0)

Out = Annotated[Path, typer.Option(help="Working folder; the checkpoint is written to OUT/emoji-sd.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of scenes, weights and noise.")]
Scenes = Annotated[int, typer.Option(help="Rendered training scenes.", min=1000)]


@app.command("emoji-sd")
def emoji_sd(
    out: Out,
    steps_vae: Annotated[int, typer.Option(min=1)] = 8500,
    steps_judge: Annotated[int, typer.Option(min=1)] = 1200,
    steps_unet: Annotated[int, typer.Option(min=1)] = 8500,
    scenes: Scenes = 40_000,
    seed: Seed = 0,
    device: Device = "auto",
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure.", min=1)] = 160,
) -> None:
    """Train autoencoder, judge, U-Net and text encoder, export, measure. The same command goes on where it stopped."""
    began = time.perf_counter()
    keep_freed_memory()
    accelerator = make_accelerator(device)
    try:
        pool = load_pool(out / "pool", scenes, seed)
        held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True)
    except ArtworkMissing as missing:
        console.print(f"[red]{missing}[/red]")
        raise typer.Exit(2) from missing
    state = out / "state"
    vae = vae_stage.train_vae(pool, state, steps_vae, seed, accelerator)
    judge = judge_stage.train_judge(pool, held_out, vae, state, steps_judge, seed, accelerator)
    unet, text, tokenizer = unet_stage.train_unet(pool, vae, state, steps_unet, seed, accelerator)
    folder = out / "emoji-sd"
    trips = vae_stage.round_trip(vae, held_out.pictures)
    exporting.export(folder, vae, unet, text, tokenizer, judge)
    console.print(f"exported {folder}; {time.perf_counter() - began:.0f} s in this call")
    recipe: dict[str, Any] = {
        "command": (
            f"python -m diffgraft_pipelines.train emoji-sd --out DIR --steps-vae {steps_vae} "
            f"--steps-judge {steps_judge} --steps-unet {steps_unet} --scenes {scenes} --seed {seed} --device {device}"
        ),
        "stages": json.loads((state / "seconds.json").read_text()),
        "scenes": scenes,
        "hardware": hardware(accelerator.device),
        "versions": exporting.versions(),
        "parameters": {
            name: sum(p.numel() for p in module.parameters())
            for name, module in {"U-Net": unet, "autoencoder": vae, "text encoder": text, "judge": judge.net}.items()
        },
        "vae_psnr_db": round(vae_stage.psnr(trips, held_out.pictures), 2),
        "scaling_factor": vae.config.scaling_factor,
    }
    (out / "recipe.json").write_text(json.dumps(recipe, indent=1) + "\n")
    measure(out, prompts)


@app.command()
def measure(
    out: Out,
    prompts: Annotated[int, typer.Option(help="Held-out prompts to measure.", min=1)] = 160,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 0: the best of a sweep.")] = 0.0,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
) -> None:
    """Measure OUT/emoji-sd on held-out prompts; write its model card, and picture grids to OUT/grids."""
    folder = out / "emoji-sd"
    pipe = measuring.StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    judge = Judge.from_pretrained(folder / "judge")
    sweep = measuring.sweep_guidance(pipe, judge, GUIDANCES)
    best = guidance or max(GUIDANCES, key=lambda g: sum(sweep[str(g)][name] for name in FIELDS))
    result = measuring.evaluate(folder, out / "grids", prompts, best)
    result["guidance_sweep"] = sweep
    exporting.write_card(folder, json.loads((out / "recipe.json").read_text()), judge, result, notes.read_text() if notes else "")
    for name, row in result["scores"].items():
        console.print(f"{name}: {row['right']} / {row['total']}, 95 % interval {row['wilson_95']}", highlight=False)


@app.command("export")
def export_now(out: Out, to: Annotated[Path, typer.Option(help="Folder to write.")], scenes: Scenes = 40_000, seed: Seed = 0) -> None:
    """Write the averaged weights of the latest U-Net checkpoint while training goes on; nothing is measured."""
    state = out / "state"
    pool = load_pool(out / "pool", scenes, seed)
    held_out = load_pool(out / "pool", HELD_OUT_SCENES, seed + 1, held_out=True)
    accelerator = make_accelerator("cpu")
    names = ("vae", "judge", "unet")
    if missing := [name for name in names if not (state / f"{name}.pt").exists()]:
        console.print(f"[red]{state} holds no checkpoint of {', '.join(missing)} yet; run emoji-sd first[/red]")
        raise typer.Exit(2)
    done = {name: torch.load(state / f"{name}.pt", weights_only=True, map_location="cpu") for name in names}
    vae = vae_stage.train_vae(pool, state, done["vae"]["step"], seed, accelerator)
    judge = judge_stage.train_judge(pool, held_out, vae, state, done["judge"]["step"], seed, accelerator)
    unet, text, tokenizer = unet_stage.load_averages(done["unet"]["averages"], unet_stage.load_tokenizer(state))
    exporting.export(to, vae, unet, text, tokenizer, judge)
    console.print(f"exported step {done['unet']['step']} to {to}")


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"


if __name__ == "__main__":
    app()
