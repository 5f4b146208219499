"""Few steps: the scheduler's own schedule, diffusers' other spacings, and the one that a search has found, on pictures that it has not seen.

    python plugins/autodiffusion/benchmarks/few_steps.py prompts --count 32 > prompts.txt       # what the search is judged on
    diffgraft search autodiffusion --pipeline emoji-sd --prompts prompts.txt --steps 4 --population 16 --epochs 6 --out found.json
    python plugins/autodiffusion/benchmarks/few_steps.py measure --found found.json --out few_steps

`prompts` are combinations that the pipeline was trained on; `measure` takes the held-out ones, from other seeds. Judge: share of pictures
that show all that was asked for, with its Wilson interval. Frechet: distance of the judge's features to those of true pictures of the same
captions, with a bootstrap interval; "worse by": the paired bootstrap interval of an arm's distance less that of the found schedule.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.findings import Finding
from diffgraft.fitness import frechet
from diffgraft.metrics import share
from diffgraft.pictures import write_atomic
from diffgraft_pipelines.emoji import scenes
from diffgraft_pipelines.emoji.judge import load_bundled
from diffgraft_pipelines.train.evaluate import generate, held_out_labels, renders
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor

NAME = "autodiffusion"
SPACINGS = ("leading", "linspace", "trailing")
FIRST_SEED = 10_000
app = typer.Typer(add_completion=False)
console = Console(width=160)


@dataclass
class Arm:
    """One schedule: a scheduler's class and options, or what was found (on the pipeline's own scheduler)."""

    name: str
    options: dict[str, Any] | None
    timesteps: tuple[float, ...] = ()
    seconds: float = 0.0
    right: int = 0
    judge: tuple[float, float, float] = (0.0, 0.0, 0.0)
    frechet: tuple[float, float, float] = (0.0, 0.0, 0.0)
    worse_by: tuple[float, float, float] | None = None


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
    found: Annotated[Path | None, typer.Option(help="What `diffgraft search autodiffusion` found.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="A diffusers scheduler instead of the pipeline's own.")] = None,
    steps: int = 4,
    guidance: float = 2.0,
    count: Annotated[int, typer.Option(help="Held-out prompts.")] = 128,
    resamples: int = 1000,
) -> None:
    """Measure all schedules on held-out prompts and write table, JSON and a grid."""
    pipe = load_pipeline(pipeline)
    unload(pipe)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    own = pipe.scheduler
    steps = steps if found is None else Finding.load(found, NAME).made_for.steps
    labels = held_out_labels()[:count]
    captions = [scenes.caption(label) for label in labels]
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    judge = load_bundled()
    truth = judge.features(renders(labels, 1))
    arms = [Arm(spacing + (" (its own)" if spacing == own.config.timestep_spacing else ""), {"timestep_spacing": spacing}) for spacing in SPACINGS]
    if "use_karras_sigmas" in own.config:
        arms.append(Arm("karras", {"use_karras_sigmas": True}))
    arms += [Arm("found", None)] if found else []
    pictures: dict[str, list[Image.Image]] = {}
    features: dict[str, Tensor] = {}
    for arm in arms:
        pipe.scheduler = own if arm.options is None else type(own).from_config(own.config, **arm.options)
        if arm.options is None:
            load_pipeline(pipe, plugins=[(NAME, {"artefact": found})])
        began = time.process_time()
        made = generate(pipe, captions, seeds, guidance, steps)
        arm.seconds = (time.process_time() - began) / count
        arm.timesteps = tuple(pipe.scheduler.timesteps.tolist())
        unload(pipe)
        pictures[arm.name], features[arm.name] = made, judge.features(made)
        verdicts = judge.score(made, captions)
        right = share([all(row[i] is not False for row in verdicts.values()) for i in range(count)])
        assert right is not None
        arm.right, arm.judge = right.right, (right.share, right.low, right.high)
        console.print(f"{arm.name}: {arm.timesteps} judge {right.share:.1%}, Frechet {frechet(features[arm.name], truth):.2f}", highlight=False)
    bootstrap(arms, features, truth, resamples)
    report(arms, count)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"pipeline": pipeline, "scheduler": type(own).__name__, "steps": steps, "guidance": guidance, "count": count,
             "torch": torch.__version__, "diffusers": diffusers.__version__, "arms": [asdict(arm) for arm in arms]}  # fmt: skip
    (out / "few_steps.json").write_text(json.dumps(facts, indent=1) + "\n")
    content = io.BytesIO()
    grid(arms, pictures, captions).save(content, format="png", optimize=True)
    write_atomic(out / "few_steps.png", content.getvalue())


def bootstrap(arms: list[Arm], features: dict[str, Tensor], truth: Tensor, resamples: int) -> None:
    """95 % intervals; the same pictures (and their true ones) are drawn for every arm, so that differences are paired."""
    rng = np.random.default_rng(0)
    n = len(truth)
    drawn: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(resamples):
        chosen, true = torch.from_numpy(rng.integers(0, n, n)), torch.from_numpy(rng.integers(0, n, n))
        for arm in arms:
            drawn[arm.name].append(frechet(features[arm.name][chosen], truth[true]))
    for arm in arms:
        low, high = np.quantile(drawn[arm.name], [0.025, 0.975])
        arm.frechet = (frechet(features[arm.name], truth), float(low), float(high))
        if "found" in drawn and arm.name != "found":
            difference = np.array(drawn[arm.name]) - np.array(drawn["found"])
            low, high = np.quantile(difference, [0.025, 0.975])
            arm.worse_by = (frechet(features[arm.name], truth) - frechet(features["found"], truth), float(low), float(high))


def report(arms: list[Arm], count: int) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold")
    for column in ("schedule", "timesteps", "judge", "Frechet", "worse than found by", "CPU s a picture"):
        table.add_column(column)
    for arm in arms:
        share_, low, high = arm.judge
        worse = "" if arm.worse_by is None else "{:.2f} ({:.2f} to {:.2f})".format(*arm.worse_by)
        table.add_row(arm.name, ", ".join(f"{t:g}" for t in arm.timesteps), f"{arm.right}/{count} = {share_:.0%} ({low:.0%}-{high:.0%})",
                      "{:.2f} ({:.2f}-{:.2f})".format(*arm.frechet), worse, f"{arm.seconds:.2f}")  # fmt: skip
    console.print(table)


def grid(arms: list[Arm], pictures: dict[str, list[Image.Image]], captions: list[str], columns: int = 10) -> Image.Image:
    """A row for the scheduler's own schedule, one for the best other one, one for what was found."""
    own = next(arm for arm in arms if "own" in arm.name)
    others = [arm for arm in arms if arm is not own and arm.name != "found"]
    rows = [own, min(others, key=lambda arm: arm.frechet[0]), *[arm for arm in arms if arm.name == "found"]]
    side, text, edge = 96, 20, 120
    sheet = Image.new("RGB", (edge + columns * (side + 4), text + len(rows) * (side + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions[:columns]):
        draw.text((edge + i * (side + 4), 4), " ".join(caption.split()[2:3]), fill="black", font_size=11)
    for r, arm in enumerate(rows):
        y = text + r * (side + 4)
        draw.multiline_text((4, y + 24), f"{arm.name}\njudge {arm.judge[0]:.0%}\nFrechet {arm.frechet[0]:.1f}", fill="black", font_size=12)
        for i, picture in enumerate(pictures[arm.name][:columns]):
            sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (edge + i * (side + 4), y))
    return sheet


if __name__ == "__main__":
    app()
