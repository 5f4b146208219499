"""Super-resolution by emoji-sr: begin at a plain network's picture, or in noise; with the hybrid prompt adapter, or without.

    python plugins/consissr/benchmarks/starts.py --out starts
    python plugins/consissr/benchmarks/starts.py --out hpa --artefact hpa.safetensors --steps 10

Held-out pictures are those of emoji-sr's card, made 16 x 16; picture i has seed i. Each arm is measured without a colour fix and with
each of the two, so that fixed stands beside fixed. Needs the font NotoColorEmoji.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import find_family, load_pipeline, unload
from diffgraft.methods.decoding import to_latents, to_pixels
from diffgraft.methods.fitness import frechet
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import FIELDS, load_bundled
from diffgraft_checkpoints.emoji.plain_sr import load
from diffgraft_checkpoints.train.pool import draw_scene
from diffgraft_checkpoints_more.bundled import HERE
from diffgraft_consissr import ConsisSR
from diffgraft_consissr.method import adain, resized, smaller, wavelet
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor

BATCH, SHOWN, SIDE = 16, 8, 64
SEED = 1
"""Of the card's held-out scenes."""
FIXES = ("none", "adain", "wavelet")


def pixels(images: list[Image.Image]) -> Tensor:
    """[n, 3, h, w] in -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(im.convert("RGB")) for im in images])).movedim(-1, 1).float() / 127.5 - 1


def pictures(x: Tensor) -> list[Image.Image]:
    return [Image.fromarray(each) for each in ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).numpy()]


def fixed(images: list[Image.Image], low: Tensor, fix: str) -> list[Image.Image]:
    """As the plugin does it with `colour=`."""
    if fix == "none":
        return images
    x, y = (pixels(images) + 1) / 2, (resized(low, (SIDE, SIDE)) + 1) / 2
    return pictures((adain if fix == "adain" else wavelet)(x, y) * 2 - 1)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % of a bootstrap over pictures."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    return float(values.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def psnr(images: list[Image.Image], true: Tensor) -> np.ndarray:
    """Of each picture, in dB; their mean is not the card's, which is of the mean error."""
    error = ((pixels(images) - true) / 2).square().mean((1, 2, 3))
    return (-10 * error.clamp(min=1e-8).log10()).numpy()


def drawn(pipe: Any, low: list[Image.Image], prompts: list[str], steps: int, **knobs: Any) -> tuple[list[Image.Image], int, float]:
    """(pictures, denoiser calls a picture, seconds a picture)."""
    found: list[Image.Image] = []
    calls, began = 0, time.perf_counter()
    load_pipeline(pipe, plugins=[ConsisSR(**{"colour": "none", **knobs})])
    for first in range(0, len(low), BATCH):
        part = low[first : first + BATCH]
        seeds = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
        call = {"num_inference_steps": steps, "guidance_scale": 1.0, "noise_level": 10, "generator": seeds}
        found += pipe(prompts[first : first + BATCH], image=part, **call).images
        calls = pipe.plugins.report().steps
    unload(pipe)
    return found, calls, (time.perf_counter() - began) / len(low)


def main(
    out: Annotated[Path, typer.Option()],
    artefact: Annotated[Path | None, typer.Option()] = None,
    number: Annotated[int, typer.Option(min=16)] = 256,
    steps: Annotated[str, typer.Option()] = "4,10,50",
    starts: Annotated[str, typer.Option(help="t_s")] = "0.1,0.2,0.4,0.6",
) -> None:
    console = Console(markup=False, highlight=False, width=200)
    torch.set_num_threads(1)
    pipe = unload(load_pipeline("emoji-sr", plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    network, judge = load(HERE / "emoji-sr"), load_bundled()
    scene = [draw_scene(SEED, i, True, True) for i in range(number)]
    true_pictures, prompts = [scenes.render(each) for each in scene], [scenes.caption(each.labels) for each in scene]
    true, wanted = pixels(true_pictures), judge.features(true_pictures)
    small = pictures(smaller(true, 4))
    low = pixels(small)
    arms: dict[str, tuple[list[Image.Image], int, float]] = {}
    if artefact is None:
        with torch.no_grad():
            large = torch.cat([network(part) for part in low.split(64)]).clamp(-1, 1)
            family = find_family(type(pipe))
            trip = torch.cat([to_pixels(pipe, family, to_latents(pipe, family, part), {}) for part in large.split(16)])
        arms["bicubic"] = pictures(resized(low, (SIDE, SIDE))), 0, 0.0
        arms["plain network"] = pictures(large), 0, 0.0
        arms["plain network, through the autoencoder"] = pictures(trip), 0, 0.0
        for n in map(int, steps.split(",")):
            arms[f"noise, {n} steps"] = drawn(pipe, small, prompts, n)
            for t_s in map(float, starts.split(",")):
                arms[f"t_s = {t_s:g}, {n} steps"] = drawn(pipe, small, prompts, n, sr=network, start=t_s)
            console.print(f"{n} steps: done")
    else:
        for n in map(int, steps.split(",")):
            for said, texts in (("caption", prompts), ("no text", [""] * number)):
                for where, start in (("noise", {}), ("t_s = 0.4", {"sr": network, "start": 0.4})):
                    for name, hpa in (("text alone", {}), ("HPA", {"artefact": artefact})):
                        arms[f"{where}, {n} steps, {said}, {name}"] = drawn(pipe, small, texts, n, **start, **hpa)
                console.print(f"{n} steps, {said}: done")
    rows = []
    for name, (images, calls, seconds) in arms.items():
        for fix in FIXES:
            shown = fixed(images, low, fix)
            scores = judge.score(shown, prompts)
            right = np.array([all(scores[field][i] is not False for field in FIELDS) for i in range(number)], dtype=float)
            db, again = psnr(shown, true), psnr(pictures(smaller(pixels(shown), 4)), low)
            base = [key for key in arms if key.startswith("noise") and f", {calls} steps" in key and artefact is None]
            plain = name.replace("HPA", "text alone") if artefact is not None else base[0] if base else name
            less = db - psnr(fixed(arms[plain][0], low, fix), true)
            row = {"arm": name, "colour": fix, "nfe": calls, "seconds": seconds, "psnr": interval(db), "small": float(again.mean()),
                   "less_plain": interval(less), "frechet": float(frechet(judge.features(shown), wanted)), "right": interval(right),
                   "psnr_of_mean": float(-10 * np.log10((10 ** (-db / 10)).mean()))}  # fmt: skip
            rows.append(row)
            told = [f"{row[key][0]:.2f} ({row[key][1]:.2f} to {row[key][2]:.2f})" for key in ("psnr", "less_plain")]  # type: ignore[index]
            console.print(f"| {name} | {fix} | {calls} | {' | '.join(told)} | {row['psnr_of_mean']:.2f} | {again.mean():.2f} | "
                          f"{row['frechet']:.2f} | {100 * right.mean():.1f} % |")  # fmt: skip
    facts = {"number": number, "python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__}
    out.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1))
    sheet(small, {**{name: images for name, (images, _, _) in arms.items()}, "true": true_pictures}, out.with_suffix(".png"))


def sheet(small: list[Image.Image], arms: dict[str, list[Image.Image]], path: Path) -> None:
    """The first pictures of all arms."""
    side, left = 72, 190
    lines = {"16 x 16": small, **arms}
    page = Image.new("RGB", (left + SHOWN * side, len(lines) * side), "white")
    pen = ImageDraw.Draw(page)
    for y, (name, images) in enumerate(lines.items()):
        pen.multiline_text((4, y * side + 26), name.replace(", ", ",\n", 1), fill="black", font_size=11)
        for x, image in enumerate(images[:SHOWN]):
            page.paste(image.resize((side - 2, side - 2), Image.Resampling.NEAREST), (left + x * side, y * side))
    page.quantize(256).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
