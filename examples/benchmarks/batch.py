"""Pictures a second of `diffgraft batch` beside a bare loop that saves its pictures: here, with one Ray worker, and with two.

    python examples/benchmarks/batch.py [--pipeline emoji-sd] [--plugin deepcache] [--pictures 40] [--steps 20] [--rounds 3] [--out FILE]

All sides draw the same lines with the same seeds, one torch thread a process, and take turns in each round; the clock of a side runs from
its third picture to its last (loading, Ray's start and first calls are not in it). A ratio is that of one round; told are its median and
range. At the end the pictures of all sides are held against each other. Wants two cores that nobody else uses.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffgraft import load_pipeline
from diffgraft.batch.rays import Cluster
from diffgraft.batch.results import Results
from diffgraft.batch.tasks import Tasks
from diffgraft.batch.work import Pool, carried_out, here, surveyed
from diffgraft.cli.batching import Opening
from diffgraft.installed import registry
from diffgraft.lab.recipes import Recipe
from PIL import Image

FIRST = 2
"""Pictures before the clock runs: each of two workers has drawn one."""


def bare(recipe: Recipe, tasks: Tasks, out: Path) -> Iterator[None]:
    """What somebody would write who needs nothing but the pictures."""
    pipe = load_pipeline(recipe.pipeline, plugins=dict(recipe.plugins))
    pipe.set_progress_bar_config(disable=True)
    out.mkdir()
    for task in tasks:
        generator = torch.Generator().manual_seed(task.recipe.seed)
        image = pipe(task.recipe.prompt, num_inference_steps=recipe.steps, generator=generator).images[0]
        image.save(out / task.name)
        yield


def batched(recipe: Recipe, tasks: Tasks, out: Path, pool: Pool) -> Iterator[None]:
    """The same by `diffgraft batch`."""
    results = Results(out)
    with results.claimed():
        for _ in carried_out(surveyed(tasks, results), tasks, results, Opening(recipe, ".png", 1), pool):
            yield


def rate(drawn: Iterator[None]) -> float:
    """Pictures a second."""
    times = [time.perf_counter() for _ in drawn]
    return (len(times) - FIRST) / (times[-1] - times[FIRST - 1])


def pixels(folder: Path) -> list[bytes]:
    return [Image.open(path).tobytes() for path in sorted(folder.glob("*.png"))]


def main(
    pipeline: Annotated[str, typer.Option()] = "emoji-sd",
    plugin: Annotated[list[str] | None, typer.Option()] = None,
    pictures: Annotated[int, typer.Option(min=4)] = 40,
    steps: Annotated[int, typer.Option(min=1)] = 20,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path | None, typer.Option(help="write the numbers here as JSON")] = None,
) -> None:
    torch.set_num_threads(1)
    recipe = Recipe(pipeline=pipeline, plugins=[(name, {}) for name in plugin or []], steps=steps, device="cpu")
    bundled = registry.bundled_of(pipeline)
    prompts = bundled.prompts if bundled else ["a cat"]
    pools: dict[str, Pool] = {"here": here, "one worker": Cluster(workers=1, gpu=False), "two workers": Cluster(workers=2, gpu=False)}
    rates: dict[str, list[float]] = {name: [] for name in ("bare loop", *pools)}
    with tempfile.TemporaryDirectory() as made:
        home = Path(made)
        lines = [json.dumps({"prompt": prompts[i % len(prompts)]}) for i in range(pictures)]
        (home / "prompts.jsonl").write_text("\n".join(lines))
        tasks = Tasks(home / "prompts.jsonl", recipe, ".png", {})
        for turn in range(rounds):
            rates["bare loop"].append(rate(bare(recipe, tasks, home / f"bare-{turn}")))
            for name, pool in pools.items():
                rates[name].append(rate(batched(recipe, tasks, home / f"{name}-{turn}", pool)))
        folders = [folder for folder in home.iterdir() if folder.is_dir()]
        same = all(pixels(folder) == pixels(folders[0]) for folder in folders)
    pairs = {
        "here / bare loop": ("here", "bare loop"),
        "one worker / bare loop": ("one worker", "bare loop"),
        "two workers / one": ("two workers", "one worker"),
    }
    ratios = {what: sorted(a / b for a, b in zip(rates[x], rates[y], strict=True)) for what, (x, y) in pairs.items()}
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):.2f} pictures a second")
    for what, found in ratios.items():
        print(f"{what}: {statistics.median(found):.3f} ({found[0]:.3f} to {found[-1]:.3f})")
    print(f"all {len(folders)} folders hold the same pictures: {same}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if out:
        versions = {name: version(name) for name in ("diffgraft-core", "torch", "diffusers", "ray")} | {"python": platform.python_version()}
        said = {"pipeline": pipeline, "plugins": plugin or [], "pictures": pictures, "steps": steps, "rounds": rounds}
        out.write_text(json.dumps({"versions": versions, **said, "rates": rates, "ratios": ratios, "same": same}, indent=1))


if __name__ == "__main__":
    typer.run(main)
