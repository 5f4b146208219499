"""Few steps: the scheduler's own schedule, diffusers' other spacings, and what a search has found, on pictures that it has not seen.

    python plugins/autodiffusion/benchmarks/few_steps.py prompts --count 32 > prompts.txt       # what the search is judged on
    diffgraft evolve autodiffusion --pipeline emoji-sd --prompts prompts.txt --steps 4 --population 16 --epochs 6 --out found.json
    python plugins/autodiffusion/benchmarks/few_steps.py measure --found found.json --out few_steps

`prompts` are combinations that the pipeline was trained on; `measure` takes held-out ones, from other seeds: one object (Frechet distance
and judge) and pairs of objects (judge), which are harder. Judge: share of pictures that show all that was asked for, with its Wilson
interval, and the mean log-likelihood of what was asked for. Frechet: distance of the judge's features to those of true pictures.

Intervals (95 %) of means and of paired differences "arm - found": grouped jackknife. A bootstrap would draw pictures twice, which takes
rank from the covariance and shifts the distance by more than its error.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.lab.metrics import share
from diffgraft.methods.files import write_atomic
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import frechet
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.evaluate import generate, held_out_labels, held_out_pairs, renders
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

NAME = "autodiffusion"
SPACINGS = ("leading", "linspace", "trailing")
FIRST_SEED = 10_000
GROUPS = 32
app = typer.Typer(add_completion=False)
console = Console(width=170)

Interval = tuple[float, float, float]
"""A value and its 95 % interval."""


@dataclass
class Arm:
    """One schedule: options of the pipeline's scheduler, or None for what was found."""

    name: str
    options: dict[str, Any] | None
    timesteps: tuple[float, ...] = ()
    cpu_seconds: float = 0.0
    judge: dict[str, Any] | None = None
    likelihood: Interval | None = None
    frechet: Interval | None = None
    less_likely_by: Interval | None = None
    farther_by: Interval | None = None


@app.command()
def prompts(count: int = 32, seed: int = 5) -> None:
    """Print captions that the pipeline was trained on, one a line."""
    trained = scenes.split()[0]
    for i in np.random.default_rng(seed).choice(len(trained), count, replace=False):
        typer.echo(scenes.caption(trained[i]))


@app.command()
def measure(
    out: Annotated[Path, typer.Option(help="Folder for few_steps.json and few_steps.png.")] = Path("few_steps"),
    pipeline: str = "emoji-sd",
    found: Annotated[Path | None, typer.Option(help="What `diffgraft evolve autodiffusion` found.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A diffusers scheduler instead of the pipeline's own.")] = None,
    steps: int = 4,
    guidance: float = 2.0,
    count: Annotated[int, typer.Option(help="Held-out prompts for one object.")] = 256,
    pairs: Annotated[int, typer.Option(help="Held-out prompts for two objects.")] = 96,
) -> None:
    """Measure all schedules on held-out prompts and write table, JSON and a grid."""
    pipe = load_pipeline(pipeline)
    unload(pipe)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    own = pipe.scheduler
    steps = steps if found is None else Finding.load(found, NAME).made_for.steps
    labels = held_out_labels()
    captions = [scenes.caption(label) for label in labels[:count]] + [scenes.pair_caption(pair) for pair in held_out_pairs(pairs)]
    seeds = range(FIRST_SEED, FIRST_SEED + len(captions))
    judge = load_bundled()
    truth = judge.features(renders(labels, 1) + renders(labels, 2))
    arms = [Arm(spacing, {"timestep_spacing": spacing}) for spacing in SPACINGS]
    if "use_karras_sigmas" in own.config:
        arms.append(Arm("karras", {"use_karras_sigmas": True}))
    arms += [Arm("found", None)] if found else []
    pictures: dict[str, list[Image.Image]] = {}
    features: dict[str, Tensor] = {}
    likelihoods: dict[str, Tensor] = {}
    for arm in arms:
        pipe.scheduler = own if arm.options is None else type(own).from_config(own.config, **arm.options)
        if arm.options is None:
            load_pipeline(pipe, plugins=[(NAME, {"artefact": found})])
        began = time.process_time()
        made = generate(pipe, captions, seeds, guidance, steps)
        arm.cpu_seconds = (time.process_time() - began) / len(made)
        arm.timesteps = tuple(pipe.scheduler.timesteps.tolist())
        unload(pipe)
        verdicts = judge.score(made, captions)
        right = [all(row[i] is not False for row in verdicts.values()) for i in range(len(made))]
        arm.judge = {name: asdict(share(part)) for name, part in (("one", right[:count]), ("pairs", right[count:]), ("all", right)) if part}
        pictures[arm.name], features[arm.name] = made, judge.features(made[:count])
        likelihoods[arm.name] = torch.tensor(judge.likelihood(made, captions), dtype=torch.float64)
        console.print(f"{arm.name}: {arm.timesteps} {arm.judge['all']}", highlight=False)
    for arm in arms:
        mine, best = (lambda kept, name=name: frechet(features[name][kept], truth) for name in (arm.name, "found"))
        arm.frechet = jackknife(mine, count)
        arm.likelihood = jackknife(lambda kept, x=likelihoods[arm.name]: float(x[kept].mean()), len(captions))
        if found and arm.name != "found":
            arm.farther_by = jackknife(lambda kept, mine=mine, best=best: mine(kept) - best(kept), count)
            less = likelihoods["found"] - likelihoods[arm.name]
            arm.less_likely_by = jackknife(lambda kept, x=less: float(x[kept].mean()), len(captions))
    report(arms)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "pipeline": pipeline,
        "scheduler": type(own).__name__,
        "own": own.config.timestep_spacing,
        "steps": steps,
        "guidance": guidance,
        "prompts": {"one": count, "pairs": pairs},
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "arms": [asdict(arm) for arm in arms],
    }
    (out / "few_steps.json").write_text(json.dumps(facts, indent=1) + "\n")
    content = io.BytesIO()
    grid(arms, own.config.timestep_spacing, pictures, captions, count).save(content, format="png", optimize=True)
    write_atomic(out / "few_steps.png", content.getvalue())


def jackknife(statistic: Callable[[Tensor], float], n: int) -> Interval:
    """A statistic of the kept rows, with its 95 % interval from leaving out one of :data:`GROUPS` groups of rows at a time."""
    rows = torch.arange(n)
    values = [statistic(rows[rows % GROUPS != group]) for group in range(GROUPS)]
    mean = sum(values) / GROUPS
    error = ((GROUPS - 1) / GROUPS * sum((value - mean) ** 2 for value in values)) ** 0.5
    value = statistic(rows)
    return value, value - 1.959964 * error, value + 1.959964 * error


def report(arms: list[Arm]) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold")
    judged = ("judge, one", "judge, pairs", "judge, all")
    for column in ("schedule", "timesteps", *judged, "log-likelihood", "found - arm", "Frechet", "arm - found"):
        table.add_column(column)
    for arm in arms:
        cells = [arm.name, ", ".join(f"{t:g}" for t in arm.timesteps)]
        for name in ("one", "pairs", "all"):
            s = (arm.judge or {}).get(name)
            cells.append("" if s is None else f"{s['right']}/{s['total']} ({s['low']:.0%}-{s['high']:.0%})")
        for value, digits in ((arm.likelihood, 4), (arm.less_likely_by, 4), (arm.frechet, 1), (arm.farther_by, 1)):
            cells.append("" if value is None else "{:.{d}f} ({:.{d}f}, {:.{d}f})".format(*value, d=digits))
        table.add_row(*cells)
    console.print(table)


def grid(arms: list[Arm], own: str, pictures: dict[str, list[Image.Image]], captions: list[str], count: int) -> Image.Image:
    """A row for the scheduler's own schedule, one for the best other one, one for what was found; pairs of objects on the right."""
    others = [arm for arm in arms if arm.name not in (own, "found")]
    best = min(others, key=lambda arm: arm.frechet[0])  # type: ignore[index]
    rows = [next(arm for arm in arms if arm.name == own), best, *[arm for arm in arms if arm.name == "found"]]
    chosen = [*range(7), *range(count, min(count + 5, len(captions)))]
    side, text, edge = 96, 6, 110
    sheet = Image.new("RGB", (edge + len(chosen) * (side + 4), text + len(rows) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for r, arm in enumerate(rows):
        y = text + r * (side + 4)
        words = f"{arm.name}\njudge {arm.judge['all']['share']:.1%}\nFrechet {arm.frechet[0]:.1f}"  # type: ignore[index]
        draw.multiline_text((4, y + 24), words, fill="black", font_size=12)
        for i, number in enumerate(chosen):
            sheet.paste(pictures[arm.name][number].resize((side, side), Image.Resampling.NEAREST), (edge + i * (side + 4), y))
    return sheet


if __name__ == "__main__":
    app()
