"""Is what the negative prompt names avoided? On emoji-sd-lcm (four steps, no guidance) with and without NAG, and on emoji-sd with CFG.

    python plugins/nag/benchmarks/avoided.py --pictures 64 --cfg-steps 20 --out avoided

Captions say an object, its size and its place, but no background, so the model chooses one. Every picture is made plain first; the judge
reads its background, and that is what the negative prompt then names ("a red background"), with the same seed. "control" names another
colour in the same way, which says how often a background changes for no good reason. "avoided": the background is no longer the plain
picture's; "object": the object is as asked. Ways are timed in batches of 16, one after the other. Writes avoided.json and avoided.png.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.lab.metrics import share
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from PIL import Image

BATCH = 16
TEMPLATE = "a {size} {object} {phrase}"


def captions(count: int) -> list[str]:
    """Captions of the held-out combinations, without their backgrounds."""
    labels = scenes.split()[1]
    order = np.random.default_rng(0).permutation(len(labels))[:count]
    return [scenes.fill(TEMPLATE, labels[i]) for i in order]


def make(pipe: Any, prompts: list[str], knobs: dict[str, Any], negatives: list[str] | None, **call: Any) -> tuple[list[Image.Image], float]:
    """The pictures, picture i with seed i, and the seconds a picture (median over the batches)."""
    images, seconds = [], []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        here = None if negatives is None else negatives[part]
        plugins = {"nag": {**knobs, "negative_prompt": tuple(here)}} if here is not None and knobs else []
        extra = {"negative_prompt": here} if here is not None and not knobs else {}
        load_pipeline(pipe, plugins=plugins)
        generators = [torch.Generator().manual_seed(first + i) for i in range(len(prompts[part]))]
        started = time.perf_counter()
        images += pipe(prompts[part], generator=generators, **extra, **call).images
        seconds.append((time.perf_counter() - started) / len(prompts[part]))
        unload(pipe)
    return images, float(np.median(seconds))


def main(
    pictures: Annotated[int, typer.Option(help="pictures a way")] = 64,
    cfg_steps: Annotated[int, typer.Option(help="steps of emoji-sd with CFG; 0 leaves it out")] = 0,
    scales: Annotated[str, typer.Option(help="NAG's scale:alpha, several by commas")] = "5:0.25,5:0.5,11:0.5",
    out: Annotated[Path | None, typer.Option(help="where the figures and pictures go")] = None,
) -> None:
    judge, prompts = load_bundled(), captions(pictures)
    colours = list(scenes.BACKGROUNDS)
    rows: list[dict[str, Any]] = []
    shown: list[list[Image.Image]] = []

    def way(label: str, images: list[Image.Image], seconds: float, was: list[str]) -> None:
        seen = judge.predict(images)
        avoided = share([found["background"] != before for found, before in zip(seen, was, strict=True)])
        right = share(judge.score(images, prompts)["object"])
        rows.append({"way": label, "avoided": str(avoided), "object": str(right), "seconds": round(seconds, 3)})
        shown.append(images[:8])
        print(f"{label:44} avoided {avoided!s:18} object {right!s:18} {seconds:.3f} s a picture", flush=True)

    def compare(name: str, label: str, settings: list[tuple[str, dict[str, Any]]], **call: Any) -> None:
        pipe = load_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        images, seconds = make(pipe, prompts, {}, None, **call)
        was = [found["background"] for found in judge.predict(images)]
        way(f"{label}, plain", images, seconds, was)
        named = [f"a {colour} background" for colour in was]
        other = [f"a {colours[(colours.index(colour) + 3) % len(colours)]} background" for colour in was]
        for words, knobs in settings:
            way(f"{label}, {words}", *make(pipe, prompts, knobs, named, **call), was)
            way(f"{label}, {words}, control", *make(pipe, prompts, knobs, other, **call), was)

    pairs = [tuple(map(float, each.split(":"))) for each in scales.split(",")]
    compare("emoji-sd-lcm", "lcm", [(f"nag scale {s:g} alpha {a:g}", {"scale": s, "alpha": a}) for s, a in pairs])
    if cfg_steps:
        compare("emoji-sd", f"emoji-sd {cfg_steps} steps", [("CFG 2", {})], num_inference_steps=cfg_steps, guidance_scale=2.0)
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        side = shown[0][0].width
        sheet = Image.new("RGB", (8 * side, len(shown) * side))
        for y, line in enumerate(shown):
            for x, image in enumerate(line):
                sheet.paste(image, (x * side, y * side))
        sheet.save(out.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
