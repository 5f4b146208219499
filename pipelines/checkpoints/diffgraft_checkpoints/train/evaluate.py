"""Measuring a trained folder on held-out prompts: judge scores, diversity over seeds, a picture grid."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from diffgraft.methods.fitness import frechet
from PIL import Image, ImageDraw
from rich.progress import track

from ..emoji import scenes
from ..emoji.judge import FIELDS, Judge
from .common import console

BATCH = 16
SWEEP_PROMPTS = 64
DIVERSITY_PROMPTS, DIVERSITY_SEEDS = 16, 6
HELD_OUT_PAIRS = 96


class Drawing(Protocol):
    """A pipeline that is called as Stable Diffusion's is."""

    def set_progress_bar_config(self, **config: Any) -> None: ...

    def __call__(self, prompt: list[str], *, num_inference_steps: int, guidance_scale: float, generator: list[torch.Generator]) -> Any: ...


def held_out_labels(seed: int = 0) -> list[scenes.Labels]:
    """All held-out combinations in a fixed random order."""
    held_out = scenes.split()[1]
    return [held_out[i] for i in np.random.default_rng(seed).permutation(len(held_out))]


def generate(pipe: Drawing, prompts: Sequence[str], seeds: Sequence[int], guidance: float, steps: int = 50) -> list[Image.Image]:
    """One picture for each prompt, from that seed's noise."""
    pipe.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    starts = range(0, len(prompts), BATCH)
    for start in track(starts, f"{len(prompts)} pictures", console=console, disable=not console.is_terminal):
        generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + BATCH]]
        batch = list(prompts[start : start + BATCH])
        images += pipe(batch, num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of a share."""
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return middle - half, middle + half


def tally(scores: Mapping[str, Sequence[bool | None]]) -> dict[str, dict[str, Any]]:
    """Right, total, share and interval for each field that the prompts say, and for all of them at once."""
    rows = {name: [s for s in row if s is not None] for name, row in scores.items()}
    rows = {name: row for name, row in rows.items() if row}  # prompts for pairs do not say the size
    everything = "all four" if len(rows) == len(scores) else "all"
    rows[everything] = [all(s is not False for s in each) for each in zip(*scores.values(), strict=True)]
    return {
        name: {
            "right": sum(row),
            "total": len(row),
            "share": round(sum(row) / len(row), 4),
            "wilson_95": [round(v, 4) for v in wilson(sum(row), len(row))],
        }
        for name, row in rows.items()
    }


def rms_distance(images: Sequence[Image.Image]) -> float:
    """Mean over pairs of the root mean square pixel difference, 0..255."""
    arrays = [np.asarray(im, dtype=np.float32) for im in images]
    return float(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(arrays, 2)]))


def renders(labels: Sequence[scenes.Labels], seed: int) -> list[Image.Image]:
    """True pictures with these labels."""
    return [scenes.render(scenes.sample_scene(each, np.random.default_rng([seed, i]))) for i, each in enumerate(labels)]


def grid(images: Sequence[Image.Image], prompts: Sequence[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """Pictures with their prompts below."""
    side, text = scenes.SIZE * scale, 34
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * (side + 8), rows * (side + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = (i % columns) * (side + 8), (i // columns) * (side + text)
        sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
        words, lines = prompt.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 22:
                lines.append("")
            lines[-1] += f"{word} "
        draw.multiline_text((x, y + side), "\n".join(lines), fill="black", spacing=0, font_size=10)
    return sheet


def sweep_guidance(pipe: Drawing, judge: Judge, guidances: Sequence[float]) -> dict[str, Any]:
    """Judge shares for several guidance scales on the last held-out combinations (not those of `evaluate`)."""
    labels = held_out_labels()[-SWEEP_PROMPTS:]
    prompts = [scenes.caption(each) for each in labels]
    found = {}
    for guidance in guidances:
        images = generate(pipe, prompts, range(50_000, 50_000 + len(prompts)), guidance)
        found[str(guidance)] = {name: row["share"] for name, row in tally(judge.score(images, prompts)).items()}
        console.print(f"guidance {guidance}: {found[str(guidance)]}", highlight=False)
    return found


def evaluate(pipe: Drawing, judge: Judge, out: Path, count: int, guidance: float, steps: int = 50) -> dict[str, Any]:
    """Figures for `count` held-out combinations (seed i for prompt i) and for held-out pairs; grids are written to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    labels = held_out_labels()[:count]
    prompts = [scenes.caption(each) for each in labels]
    began = time.perf_counter()
    images = generate(pipe, prompts, range(count), guidance, steps)
    seconds = time.perf_counter() - began
    grid(images[:64], prompts[:64]).save(out / "held-out.png")
    both = [scenes.pair_caption(each) for each in held_out_pairs(HELD_OUT_PAIRS)]
    drawn = generate(pipe, both, range(2000, 2000 + len(both)), guidance, steps)
    grid(drawn[:64], both[:64]).save(out / "pairs.png")
    seen = {name: labels_of(name)[0] for name in scenes.OBJECTS}
    one_each = [scenes.caption(replace(each, size="big")) for each in seen.values()]
    grid(generate(pipe, one_each, range(len(one_each)), guidance, steps), one_each).save(out / "objects.png")
    one, two = judge.score(images, prompts), judge.score(drawn, both)
    true, other = (judge.features(renders(labels, seed)) for seed in (1, 2))
    return {
        "prompts": count,
        "steps": steps,
        "guidance": guidance,
        "seconds_per_picture": round(seconds / count, 2),
        "scores": tally(one),
        "pairs": tally(two),
        "frechet_to_renders": round(frechet(judge.features(images), true), 3),
        "frechet_renders_to_renders": round(frechet(other, true), 3),
        "diversity_rms": diversity(pipe, guidance, out, steps),
        "wrong": [*wrong(one, prompts), *wrong(two, both)],
    }


def held_out_pairs(count: int, seed: int = 0) -> list[scenes.Pair]:
    """Pairs of objects that the training does not show together, always the same."""
    return [scenes.draw_pair(np.random.default_rng([seed, i, 4]), held_out=True) for i in range(count)]


def wrong(scores: Mapping[str, Sequence[bool | None]], prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The pictures that are not as their prompt says, and in what."""
    faults = [[name for name in FIELDS if scores[name][i] is False] for i in range(len(prompts))]
    return [{"prompt": prompt, "wrong": found} for prompt, found in zip(prompts, faults, strict=True) if found]


def labels_of(name: str) -> list[scenes.Labels]:
    """The held-out combinations of one object (of all combinations, where none is held out)."""
    held_out = [each for each in held_out_labels() if each.object == name]
    return held_out or [each for each in scenes.split()[0] if each.object == name]


def diversity(pipe: Drawing, guidance: float, out: Path, steps: int = 50) -> dict[str, float]:
    """Mean pairwise RMS pixel distance (0..255) over seeds of one prompt, of pictures and of true renders."""
    labels = held_out_labels()[:DIVERSITY_PROMPTS]
    prompts = [scenes.caption(each) for each in labels for _ in range(DIVERSITY_SEEDS)]
    images = generate(pipe, prompts, range(1000, 1000 + len(prompts)), guidance, steps)
    true = renders([each for each in labels for _ in range(DIVERSITY_SEEDS)], 3)
    grid(images[: 8 * DIVERSITY_SEEDS], prompts[: 8 * DIVERSITY_SEEDS], DIVERSITY_SEEDS).save(out / "seeds.png")

    def mean_distance(pictures: Sequence[Image.Image]) -> float:
        starts = range(0, len(pictures), DIVERSITY_SEEDS)
        return round(float(np.mean([rms_distance(pictures[s : s + DIVERSITY_SEEDS]) for s in starts])), 1)

    return {"generated": mean_distance(images), "true_renders": mean_distance(true)}
