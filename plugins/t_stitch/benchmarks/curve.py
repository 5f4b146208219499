"""Quality and time against the share of the steps that the small model runs.

    python plugins/t_stitch/benchmarks/curve.py --pipeline emoji-sd --model emoji-sd-small --prompts 48 --out curve
    ... --fractions 0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1 --fewer 40,30,20   # beside it: the large model alone with fewer steps
    ... --beside deepcache:interval=3                                          # another plugin on the large model's part
    ... --scheduler LCMScheduler --steps 4 --guidance 1 --lora FOLDER --small-lora FOLDER

Every picture is made in every way before the next picture begins, so that the machine's moods meet all alike; the times are of the whole
call. The judge is the bundled pipeline's own; PSNR and speed-up are against share 0, which is always measured (with --beside: the large
model with that plugin).
Writes curve.json, curve.png and the first pictures of each share as a grid.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.installed import registry
from diffgraft.lab.judging import load_judge
from diffgraft.lab.metrics import psnr, share
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

PROMPTS = ("a red apple on the left on a blue background", "a small dog face at the top on a gray background")
"""For pipelines that bring no prompts of their own."""


def load(name: str, device: str, dtype: str, lora: str | None, scheduler: str | None) -> Any:
    """A pipeline by name, with a LoRA and another scheduler where one is named."""
    pipe = load_pipeline(name, dtype=getattr(torch, dtype)).to(device)
    if lora is not None:
        pipe.load_lora_weights(lora)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spec(text: str) -> tuple[str, dict[str, Any]]:
    """``name:knob=value,knob=value`` as a plugin and its knobs."""
    name, _, knobs = text.partition(":")
    pairs = (item.partition("=") for item in knobs.split(",") if item)
    return name, {key: json.loads(value) if value[:1] in "0123456789-tfn[" else value for key, _, value in pairs}


def timed(pipe: Any, seed: int, **arguments: Any) -> tuple[Image.Image, float]:
    """One picture and the seconds that the call took."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    picture = pipe(generator=torch.Generator().manual_seed(seed), **arguments).images[0]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return picture, time.perf_counter() - started


def verdicts(judge: Any, pictures: list[Image.Image], prompts: list[str]) -> dict[str, Any]:
    """Share of right verdicts, with its 95 % interval, for each thing that the prompts ask for, and for all of them together."""
    if judge is None:
        return {}
    fields = judge.score(pictures, prompts)
    asked = [[row for row in column if row is not None] for column in zip(*fields.values(), strict=True)]
    shares = {name: share(row) for name, row in {**fields, "all": [all(row) for row in asked]}.items()}
    return {name: vars(found) for name, found in shares.items() if found is not None}


def draw(every: list[dict[str, Any]], steps: int, title: str, path: Path) -> None:
    """Score (or PSNR, without a judge) and time against the share; score against time, beside the large model with fewer steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, fewer = [row for row in every if row["steps"] == steps], [row for row in every if row["steps"] != steps]
    judged = all("all" in row["judge"] for row in every)

    def score(row: dict[str, Any]) -> float:
        value = row["judge"]["all"]["share"] if judged else row["psnr"]
        return float("nan") if value is None else value

    x, seconds, y = [row["fraction"] for row in rows], [row["seconds"] for row in rows], [score(row) for row in rows]
    name = "all that was asked is right" if judged else "PSNR to the large model (dB)"
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    if judged:
        found = [row["judge"]["all"] for row in rows]
        left.fill_between(x, [f["low"] for f in found], [f["high"] for f in found], alpha=0.2, linewidth=0)
    left.plot(x, y, "o-")
    left.set(xlabel="share of the steps by the small model", ylabel=name)
    right_axis = left.twinx()
    right_axis.plot(x, seconds, "s--", color="tab:orange")
    right_axis.set_ylabel("seconds a picture (dashed)")
    right.plot(seconds, y, "o-", label="share of the small model")
    if fewer:
        right.plot([row["seconds"] for row in fewer], [score(row) for row in fewer], "^:", label="large model alone, fewer steps")
    for row, text in [*((row, f"{row['fraction']:g}") for row in rows), *((row, str(row["steps"])) for row in fewer)]:
        if score(row) == score(row):
            right.annotate(text, (row["seconds"], score(row)), textcoords="offset points", xytext=(5, 5))
    right.legend()
    right.set(xlabel="seconds a picture", ylabel=name)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def grid(pictures: list[list[Image.Image]], path: Path, columns: int = 8) -> None:
    """One row a way of making them."""
    rows = [np.concatenate([np.asarray(p.convert("RGB")) for p in row[:columns]], axis=1) for row in pictures]
    Image.fromarray(np.concatenate(rows)).save(path)


def main(
    pipeline: str = "emoji-sd",
    model: str = "emoji-sd-small",
    fractions: Annotated[str, typer.Option(help="shares of the small model, by comma")] = "0,0.2,0.4,0.6,0.8,1",
    fewer: Annotated[str, typer.Option(help="beside them: the large model alone with so many steps, by comma")] = "",
    prompts: Annotated[int, typer.Option(help="how many pictures a share; the pipeline's prompts in turn, a seed each")] = 48,
    steps: Annotated[int | None, typer.Option(help="[default: the bundled pipeline's, else 50]")] = None,
    guidance: Annotated[float | None, typer.Option(help="[default: the bundled pipeline's, else the class's]")] = None,
    rule: str = "steps",
    beside: Annotated[list[str] | None, typer.Option(help="another plugin inside t_stitch, name:knob=value,...")] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA on the large model, a folder or Hub id")] = None,
    small_lora: Annotated[str | None, typer.Option(help="the same on the small model")] = None,
    scheduler: Annotated[str | None, typer.Option(help="a diffusers class, for both")] = None,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
    out: Annotated[Path, typer.Option(help="folder for curve.json, curve.png, grid.png")] = Path("curve"),
) -> None:
    """The curve of one pair of models."""
    if threads:
        torch.set_num_threads(threads)
    known = registry.find_bundled(pipeline) if pipeline in registry.bundled_names() else None
    steps = steps or (known.steps if known is not None else 50)
    ways = [(r, steps) for r in sorted({0.0, *(float(text) for text in fractions.split(","))})]
    ways += [(0.0, int(text)) for text in fewer.split(",") if text]
    texts = known.prompts if known is not None and known.prompts else PROMPTS
    wanted = [texts[i % len(texts)] for i in range(prompts)]
    settings = dict(known.call) if known is not None else {}
    scale = guidance if guidance is not None or known is None else known.guidance_scale
    settings |= {} if scale is None else {"guidance_scale": scale}

    large = load(pipeline, device, dtype, lora, scheduler)
    small = load(model, device, dtype, small_lora, scheduler)
    others = [spec(text) for text in beside or []]
    pipe = load_pipeline(large, plugins=[("t_stitch", {"model": small, "fraction": 0.0, "rule": rule}), *others])
    pictures: dict[tuple[float, int], list[Image.Image]] = {way: [] for way in ways}
    seconds: dict[tuple[float, int], list[float]] = {way: [] for way in ways}
    calls: dict[tuple[float, int], dict[str, int]] = {}

    def make(way: tuple[float, int], seed: int, prompt: str) -> tuple[Image.Image, float]:
        pipe.plugins.configure("t_stitch", fraction=way[0])
        return timed(pipe, seed, prompt=prompt, num_inference_steps=way[1], **settings)

    for r in (0.0, 1.0):  # warm both models
        make((r, steps), 0, wanted[0])
    for seed, prompt in enumerate(track(wanted, "pictures", console=Console(stderr=True))):
        for way in ways if seed % 2 == 0 else ways[::-1]:
            picture, took = make(way, seed, prompt)
            pictures[way].append(picture)
            seconds[way].append(took)
            part = pipe.plugins.report().plugins["t_stitch"]
            calls[way] = {key: part.total(key) for key in ("small", "large")}

    judge = load_judge(known) if known is not None else None
    arrays = {way: np.stack([np.asarray(p.convert("RGB"), np.float32)[None] / 255 for p in row]) for way, row in pictures.items()}
    base, rows = (0.0, steps), []
    for way in ways:
        near = [value for value in psnr(arrays[way], arrays[base]) if np.isfinite(value)]
        middle = statistics.median(seconds[way])
        row = {"fraction": way[0], "steps": way[1], **calls[way], "seconds": middle, "fastest": min(seconds[way])}
        row |= {"speed_up": statistics.median(seconds[base]) / middle, "psnr": statistics.mean(near) if near else None}
        rows.append({**row, "judge": verdicts(judge, pictures[way], wanted)})

    named = list(rows[0]["judge"])
    title = f"{pipeline} after {model}: {steps} steps, guidance {scale}, {prompts} pictures, rule {rule}"
    title += "".join(f", {name} {knobs}" for name, knobs in others) + (f", {scheduler}" if scheduler else "")
    table = Table(title=title)
    for name in ("share", "steps", "small calls", "large calls", "seconds", "speed-up", "PSNR", *named):
        table.add_column(name, justify="right")
    for row in rows:
        cells = [f"{row['fraction']:g}", *(str(row[key]) for key in ("steps", "small", "large"))]
        cells += [f"{row['seconds']:.3f}", f"{row['speed_up']:.2f}x"]
        cells += ["-" if row["psnr"] is None else f"{row['psnr']:.1f}"]
        cells += [f"{(v := row['judge'][name])['share']:.0%} ({v['low']:.0%}-{v['high']:.0%})" for name in named]
        table.add_row(*cells)
    console = Console()
    (console if console.is_terminal else Console(width=150)).print(table)

    out.mkdir(parents=True, exist_ok=True)
    machine = {"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__, "device": device}
    about = {"title": title, "threads": torch.get_num_threads(), "dtype": dtype, "lora": lora, "small_lora": small_lora, **machine}
    (out / "curve.json").write_text(json.dumps({"about": about, "rows": rows, "all_seconds": list(seconds.values())}, indent=1) + "\n")
    draw(rows, steps, title, out / "curve.png")
    grid(list(pictures.values()), out / "grid.png")


if __name__ == "__main__":
    typer.run(main)
