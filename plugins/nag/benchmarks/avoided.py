"""Is what the negative prompt names avoided? On few-step models without guidance, with and without NAG; and on emoji-sd with CFG.

    python plugins/nag/benchmarks/avoided.py --pictures 64 --cfg-steps 10 --models emoji-flux-4step,emoji-wan-4step,emoji-sd-lcm

Captions say an object, its size and its place or motion, but no background, so the model chooses one. Every picture is made plain first;
the judge reads its background, and that is what the negative prompt then names ("a red background"), with the same seed. "control" names
another colour likewise, which says how often a background changes for no good reason. "avoided": the background is no longer the
plain picture's; "object": the object is as asked. Ways are timed in batches of 16, one after the other. `--out avoided` writes a .json and
a .png.
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
from diffgraft_checkpoints.emoji import judge as still_judge
from diffgraft_checkpoints.emoji import motion, motion_judge, scenes
from PIL import Image

BATCH = 16
TEMPLATE = "a {size} {object} {phrase}"


SKIP = 32
"""Captions and seeds on which the settings were chosen; those behind them are measured."""


def captions(count: int, moving: bool = False) -> list[str]:
    """Captions of the held-out combinations, without their backgrounds."""
    labels: Any = motion.split()[1] if moving else scenes.split()[1]
    order = np.random.default_rng(0).permutation(len(labels))[SKIP : SKIP + count]
    if moving:
        return [f"a {each.size} {each.object} {motion.MOTION_PHRASES[each.motion]}" for each in (labels[i] for i in order)]
    return [scenes.fill(TEMPLATE, labels[i]) for i in order]


def make(pipe: Any, prompts: list[str], knobs: dict[str, Any], negatives: list[str] | None, **call: Any) -> tuple[list[Any], float]:
    """The pictures (or clips), number i with seed SKIP + i, and the seconds a picture (median over the batches)."""
    images, seconds = [], []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        here = None if negatives is None else negatives[part]
        plugins = {"nag": {**knobs, "negative_prompt": tuple(here)}} if here is not None and knobs else []
        extra = {"negative_prompt": here} if here is not None and not knobs else {}
        load_pipeline(pipe, plugins=plugins)
        generators = [torch.Generator().manual_seed(SKIP + first + i) for i in range(len(prompts[part]))]
        started = time.perf_counter()
        out = pipe(prompts[part], generator=generators, **extra, **call)
        images += list(out.frames if "frames" in out else out.images)
        seconds.append((time.perf_counter() - started) / len(prompts[part]))
        unload(pipe)
    return images, float(np.median(seconds))


def main(
    pictures: Annotated[int, typer.Option(help="pictures a way")] = 64,
    cfg_steps: Annotated[int, typer.Option(help="steps of emoji-sd with CFG; 0 leaves it out")] = 0,
    scales: Annotated[str, typer.Option(help="NAG's scale:alpha, or scale:alpha:pooled, several by commas")] = "3:0.25,5:0.25",
    models: Annotated[str, typer.Option(help="bundled few-step models, several by commas")] = "emoji-flux-4step",
    out: Annotated[Path | None, typer.Option(help="where the figures and pictures go")] = None,
) -> None:
    colours = list(scenes.BACKGROUNDS)
    rows: list[dict[str, Any]] = []
    shown: list[list[Image.Image]] = []

    def compare(name: str, label: str, settings: list[tuple[str, dict[str, Any]]], **call: Any) -> None:
        pipe = load_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        moving = "wan" in name
        judge, prompts = (motion_judge if moving else still_judge).load_bundled(), captions(pictures, moving)

        def way(words: str, images: list[Any], seconds: float) -> None:
            changed = share([found["background"] != before for found, before in zip(judge.predict(images), was, strict=True)])
            right = share(judge.score(images, prompts)["object"])
            rows.append({"way": f"{label}, {words}", "avoided": str(changed), "object": str(right), "seconds": round(seconds, 3)})
            shown.append([motion_judge.to_frames(each)[-1] if moving else each for each in images[:8]])
            print(f"{label + ', ' + words:60} avoided {changed!s:18} object {right!s:18} {seconds:.3f} s a picture", flush=True)

        images, seconds = make(pipe, prompts, {}, None, **call)
        was = [found["background"] for found in judge.predict(images)]
        way("plain", images, seconds)
        named = [f"a {colour} background" for colour in was]
        other = [f"a {colours[(colours.index(colour) + 3) % len(colours)]} background" for colour in was]
        for words, knobs in settings:
            way(words, *make(pipe, prompts, knobs, named, **call))
            way(f"{words}, control", *make(pipe, prompts, knobs, other, **call))

    chosen = []
    for each in scales.split(","):
        scale, alpha, *pooled = each.split(":")
        knobs = {"scale": float(scale), "alpha": float(alpha), **({"pooled": pooled[0]} if pooled else {})}
        chosen.append((f"nag scale {scale} alpha {alpha}" + "".join(f" pooled {word}" for word in pooled), knobs))
    for name in models.split(","):
        compare(name, name, chosen)
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
