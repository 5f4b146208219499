"""What the commands share: their options, the training data, and how a checkpoint was made."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from ..bundled import emoji_sd
from ..emoji.scenes import ArtworkMissing
from .common import console, keep_freed_memory, make_accelerator
from .export import versions
from .pool import Pairs, Pool, load_pairs, load_pool

HELD_OUT_SCENES = 1000
PAIR_SHARE = 0.4
"""Pictures of two objects, for one of a single object."""

Out = Annotated[Path, typer.Option(help="Working folder; the checkpoint is written to OUT/NAME.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of scenes, weights and noise.")]
Scenes = Annotated[int, typer.Option(help="Rendered training scenes.", min=1000)]
Prompts = Annotated[int, typer.Option(help="Held-out prompts to measure.", min=1)]
Steps = Annotated[int, typer.Option(min=1)]

BASE = Path(emoji_sd.path)
Base = Annotated[Path, typer.Option(help="The emoji-sd to start from: a folder with its judge.")]


@contextmanager
def needs_artwork() -> Iterator[None]:
    """A command that ends with one sentence where the artwork is not on this machine."""
    try:
        yield
    except ArtworkMissing as missing:
        console.print(f"[red]{missing}[/red]")
        raise typer.Exit(2) from missing


def load_scenes(out: Path, scenes: int, seed: int, upright: bool = False) -> Pool:
    """Training scenes, rendered where they are not there yet."""
    with needs_artwork():
        return load_pool(out / "pool", scenes, seed, upright=upright)


def load_data(out: Path, scenes: int, seed: int, upright: bool = False) -> tuple[Pool, Pairs]:
    """Training scenes and pairs, rendered where they are not there yet."""
    return load_scenes(out, scenes, seed, upright), load_pairs(out / "pool", round(PAIR_SHARE * scenes), seed, upright)


def start(base: Path, device: str) -> tuple[Accelerator, StableDiffusionPipeline]:
    """What a training that begins from emoji-sd needs beside its data: the device, and emoji-sd itself."""
    keep_freed_memory()
    return make_accelerator(device), StableDiffusionPipeline.from_pretrained(base, local_files_only=True)


PARTS = ("unet", "transformer", "model", "vae", "text_encoder", "text_encoder_2")


def describe(
    name: str,
    pipe: Any,
    state: Path,
    stages: tuple[str, ...],
    steps: dict[str, int],
    scenes: int | None,
    seed: int,
    device: str,
    pairs: bool = False,
) -> dict[str, Any]:
    """How a checkpoint was made, for its card: from `scenes` pictures (None: from no pictures) and, with `pairs`, of two objects too."""
    seconds = json.loads((state / "seconds.json").read_text())
    counted = " ".join(f"--steps{f'-{stage}' if stage else ''} {count}" for stage, count in steps.items())
    drawn = "" if scenes is None else f" --scenes {scenes}"
    return {
        "command": f"python -m diffgraft_checkpoints.train {name} --out DIR {counted}{drawn} --seed {seed} --device {device}",
        "stages": {stage: seconds[stage] for stage in stages if stage in seconds},
        **({} if scenes is None else {"scenes": scenes}),
        **({} if scenes is None or not pairs else {"pairs": round(PAIR_SHARE * scenes)}),
        "hardware": hardware(make_accelerator(device).device),
        "versions": versions(),
        "parameters": {part: sum(p.numel() for p in getattr(pipe, part).parameters()) for part in PARTS if hasattr(pipe, part)},
    }


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of an emoji-sd: measured, or just exported."""
    measured = folder / "evaluation.json"
    if measured.exists():
        return dict(json.loads(measured.read_text())["recipe"])
    return read_recipe(folder.parent, folder.name)


def continued(before: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """`recipe` of a stage that went on from a base, after what was done `before`; its own scenes are in its command."""
    kept = {name: before[name] for name in ("scenes", "pairs")}
    commands = f"{before['command']}; {recipe['command']} --base BASE"
    return {**before, **recipe, **kept, "command": commands, "stages": {**before["stages"], **recipe["stages"]}}


def write_recipe(out: Path, name: str, recipe: dict[str, Any]) -> None:
    """Keep the recipe for `measure`."""
    (out / f"recipe-{name}.json").write_text(json.dumps(recipe, indent=1) + "\n")


def read_recipe(out: Path, name: str) -> dict[str, Any]:
    """What `write_recipe` has kept."""
    return dict(json.loads((out / f"recipe-{name}.json").read_text()))


def hardware(device: torch.device) -> str:
    """The machine in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU"
