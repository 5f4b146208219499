"""Two experts on a small emoji model, "layout" early and "detail" late, against one LoRA for all levels, and against the two exchanged.

    python plugins/segment_lora/benchmarks/experts.py --out experts    # minutes of a core; interrupted, it goes on

1. The model draws some pictures of each training caption (two objects), in the few steps that are measured later. Of each it is measured
   how far apart its objects lie, and how probable the judge takes them to be those that were asked for. A caption's pictures with the
   largest and the least distance are a pair for "layout", those with the most and the least probable objects one for "detail". (The judge's
   own word on places is no use here: the model puts 97 % of the objects where they were asked for.)
2. Three LoRA of one rank learn: "layout" within the noisy segment, "detail" within the other, and "global" over all levels from both sets
   of pairs, with as many steps as one of them (`--global-steps`).
3. Held-out captions (no training picture shows these two objects together) are drawn from the same noise by every arm.

Intervals: 95 % bootstrap over captions, of the difference to the base. OUT/ holds the pairs, the LoRA and results.csv.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.methods.examples import read_examples
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import apart, bundled_once, to_batch
from diffgraft_segment_lora import SegmentLora
from PIL import Image
from rich.console import Console
from rich.table import Table

SCORES = {"layout": "apart", "detail": "object"}
TEMPLATE = scenes.PAIR_TEMPLATES[0][0]
BATCH = 32
MARGIN = {"apart": 1.0, "object": 0.2}
"""What two pictures differ by at least to be a pair: pixels, nats."""
console = Console(width=150)


def draw_captions(held_out: bool, number: int, seed: int) -> list[scenes.Pair]:
    """Two objects each, of which the model was trained on pictures that show them together, or not."""
    rng = np.random.default_rng(seed)
    return [scenes.draw_pair(rng, held_out) for _ in range(number)]


def said(pair: scenes.Pair) -> str:
    return scenes.fill_pair(TEMPLATE, pair)


def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> list[Image.Image]:
    images: list[Image.Image] = []
    for k in range(0, len(prompts), BATCH):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[k : k + BATCH]]
        images += pipe(list(prompts[k : k + BATCH]), num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
    return images


def offset(image: Image.Image, place: str) -> float:
    """How far, in pixels, what is not background lies from the middle in the direction of its place, in that half of the picture alone."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    there = np.abs(pixels - np.median(border, axis=0)).sum(2) > 60
    dx, dy = scenes.PLACES[place]
    along = np.arange(scenes.SIZE) + 0.5 - scenes.SIZE / 2
    distance = dx * along[None, :] + dy * along[:, None] + np.zeros_like(there, dtype=np.float64)
    there &= distance > 0
    return float(distance[there].mean()) if there.any() else 0.0


@torch.no_grad()
def judged(images: Sequence[Image.Image], pairs: Sequence[scenes.Pair]) -> dict[str, np.ndarray]:
    """By picture: how far its objects are apart; log-probability of the asked objects and places; whether each is the most probable one."""
    judge = bundled_once()
    logits = [judge.net(part) for part in to_batch(apart(images, pairs)).split(64)]
    found = {"apart": np.array([sum(offset(image, str(each.place)) for each in pair) for image, pair in zip(images, pairs, strict=True)])}
    for field in ("place", "object"):
        log = torch.cat([part[field] for part in logits]).log_softmax(1)
        wanted = torch.tensor([judge.config.classes[field].index(getattr(each, field)) for pair in pairs for each in pair])
        found[field] = log.gather(1, wanted[:, None]).view(-1, 2).sum(1).numpy()
        found[field + " right"] = (log.argmax(1) == wanted).view(-1, 2).all(1).numpy().astype(float)
    return found


def make_pairs(pipe: Any, out: Path, number: int, candidates: int, steps: int, guidance: float) -> None:
    """Folders OUT/layout and OUT/detail with pairs, and OUT/global with both."""
    pairs = [each for each in draw_captions(False, number, 1) for _ in range(candidates)]
    images = draw(pipe, [said(each) for each in pairs], range(100_000, 100_000 + len(pairs)), steps, guidance)
    scores, every = judged(images, pairs), []
    (out / "global").mkdir(exist_ok=True)
    for expert, score in SCORES.items():
        folder, lines = out / expert, []
        folder.mkdir(exist_ok=True)
        for i, row in enumerate(scores[score].reshape(number, candidates)):
            if row.max() - row.min() < MARGIN[score]:
                continue
            chosen = {"file_name": int(row.argmax()), "worse": int(row.argmin())}
            names = {key: f"{expert}-{i:04}-{key[0]}.png" for key in chosen}
            for key, j in chosen.items():
                for home in (folder, out / "global"):
                    images[i * candidates + j].save(home / names[key])
            lines.append(json.dumps({**names, "text": said(pairs[i * candidates])}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{expert}: {len(lines)} pairs of {number} captions", flush=True)
        every += lines
    (out / "global" / "metadata.jsonl").write_text("\n".join(every) + "\n")


def learn(pipe: Any, out: Path, name: str, segment: tuple[float, float], steps: int, settings: CallSettings, knobs: dict[str, Any]) -> Path:
    """`diffgraft fit segment_lora --data OUT/NAME`; nothing where it is done."""
    path = out / f"{name}.safetensors"
    if not path.exists():
        segment_knobs = {"start": segment[0], "end": segment[1], **knobs}
        found = fit(pipe, SegmentLora(), read_examples(out / name), settings, path, FitPlan(steps, keep_every=20.0), knobs=segment_knobs)
        losses = found.facts["fit"]["losses"]
        print(f"{name}: loss {losses[0]:.3f} at the start, {np.mean(losses[-10:]):.3f} in the last tenth", flush=True)
    return path


def bounds(difference: np.ndarray) -> tuple[float, float, float]:
    """Mean and its 95 % interval."""
    rng = np.random.default_rng(0)
    means = difference[rng.integers(0, len(difference), (4000, len(difference)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(difference.mean()), float(low), float(high)


def interval(difference: np.ndarray) -> str:
    return "{:+.3f} ({:+.3f} to {:+.3f})".format(*bounds(difference))


def chart(found: dict[str, dict[str, np.ndarray]], title: str, path: Path) -> None:
    """Gains in both goals, an arm a point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for name, row in found.items():
        if name != "base":
            (x, x0, x1), (y, y0, y1) = (bounds(row[key] - found["base"][key]) for key in ("apart", "object"))
            axes.errorbar(x, y, xerr=[[x - x0], [x1 - x]], yerr=[[y - y0], [y1 - y]], fmt="o", capsize=3, label=name)
    axes.axhline(0, color="k", linewidth=0.6)
    axes.axvline(0, color="k", linewidth=0.6)
    axes.set(xlabel="objects further apart than the base's, pixels", ylabel="log p of the asked objects, gain over the base")
    axes.set_title(f"{title}, 95 % intervals", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(
    out: Annotated[Path, typer.Option(help="folder for pairs, LoRA and results")],
    pipeline: str = "emoji-sd-small",
    steps: Annotated[int, typer.Option(help="of the solver")] = 6,
    guidance: float = 1.0,
    boundary: Annotated[float, typer.Option(help="sigma at which layout ends and detail begins")] = 0.6,
    train: Annotated[int, typer.Option(help="training captions")] = 256,
    candidates: int = 6,
    fit_steps: Annotated[int, typer.Option(help="of the optimizer, each expert")] = 120,
    global_steps: Annotated[int, typer.Option(help="of the optimizer, the one for all levels; 0: as many as an expert")] = 0,
    rate: float = 3e-4,
    beta: float = 1000.0,
    test: Annotated[int, typer.Option(help="held-out captions")] = 128,
) -> None:
    torch.set_num_threads(1)
    pipe = unload(load_pipeline(pipeline))
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "global" / "metadata.jsonl").exists():
        make_pairs(pipe, out, train, candidates, steps, guidance)
    knobs, settings = {"rate": rate, "beta": beta}, CallSettings(steps=steps, guidance_scale=guidance)
    early, late = (1.0, boundary), (boundary, 0.0)
    layout = learn(pipe, out, "layout", early, fit_steps, settings, knobs)
    detail = learn(pipe, out, "detail", late, fit_steps, settings, knobs)
    whole = learn(pipe, out, "global", (1.0, 0.0), global_steps or fit_steps, settings, knobs)
    arms: dict[str, dict[str, Any] | None] = {
        "base": None,
        "layout early": {"lora": str(layout), "segments": (early,)},
        "detail late": {"lora": str(detail), "segments": (late,)},
        "both experts": {"lora": [str(layout), str(detail)], "segments": (early, late)},
        "exchanged": {"lora": [str(detail), str(layout)], "segments": (early, late)},
        "one for all levels": {"lora": str(whole), "segments": ((1.0, 0.0),)},
    }
    pairs = draw_captions(True, test, 2)
    prompts, found = [said(each) for each in pairs], {}
    for name, settings in arms.items():
        if settings is not None:
            load_pipeline(pipe, plugins=[("segment_lora", settings)])
        found[name] = judged(draw(pipe, prompts, range(test), steps, guidance), pairs)
        if settings is not None:
            unload(pipe)
        print(name, {key: round(float(row.mean()), 4) for key, row in found[name].items()}, flush=True)
    title = f"{pipeline}, {steps} steps, {test} held-out captions"
    chart(found, title, out / "gains.png")
    table = Table(title=title)
    for head in ("", "objects right", "places right", "apart - base, pixels", "log p(objects) - base", "log p(places) - base"):
        table.add_column(head)
    for name, row in found.items():
        rights = [f"{int(row[f'{field} right'].sum())}/{test}" for field in ("object", "place")]
        gains = [""] * 3 if name == "base" else [interval(row[key] - found["base"][key]) for key in ("apart", "object", "place")]
        table.add_row(name, *rights, *gains)
    console.print(table)
    with (out / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        keys = list(found["base"])
        writer.writerow(["arm", "prompt", *keys])
        for name, row in found.items():
            writer.writerows([name, prompt, *(f"{row[key][i]:.5f}" for key in keys)] for i, prompt in enumerate(prompts))


if __name__ == "__main__":
    typer.run(main)
