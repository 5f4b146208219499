"""A-STAR on prompts with two objects: the judge, the time, the losses and the maps, against plain sampling at the same number of steps and
in the same time, and stacked with DeepCache.

    python plugins/a_star/benchmarks/two_objects.py --prompts 96 --steps 20 --out two_objects

Prompts: the held-out pairs of the bundled checkpoint (objects that no training picture shows together), prompt i with seed i, in batches of
16. Every batch is made in every way before the next one begins, in turn forwards and backwards, so that the machine's moods meet all alike.
The judge reads both objects, each half of the picture alone. "same time" is plain sampling with as many steps as fit into A-STAR's time,
measured on a batch beforehand; "better of two seeds" makes every picture twice and keeps the one that the judge finds likelier.
Writes two_objects.json, grid.png (pictures whose verdict A-STAR changes first) and maps.png (the objects' attention maps).
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import diffusers
import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.lab.metrics import share
from diffgraft_a_star import AStar
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.evaluate import held_out_pairs
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

BATCH, ELSEWHERE = 16, 10_000


@dataclass
class Way:
    """A way of making the pictures, and what came of it."""

    label: str
    plugins: list[Any] = field(default_factory=list)
    steps: int = 0
    seed: int = 0
    images: list[Image.Image] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def time(self) -> float:
        """Median seconds a picture."""
        return statistics.median(self.seconds) / BATCH


class Watched(AStar):
    """A-STAR that keeps its maps [steps, batch, M, h, w] and losses [steps, batch] (``alpha=1e-9`` only watches)."""

    name = "a_star"

    def run(self, call: Any, next: Any) -> Any:
        self.seen: list[torch.Tensor] = []
        result = super().run(call, next)
        self.L = torch.stack(call.shared.losses)
        return result

    def maps(self, call: Any, z: Any) -> Any:
        A = super().maps(call, z)
        self.seen.append(A.detach())
        return A


def make(pipe: Any, way: Way, prompts: list[str], first: int, guidance: float) -> tuple[list[Image.Image], float]:
    """One batch and the seconds that the call took."""
    load_pipeline(pipe, plugins=way.plugins)
    try:
        generators = [torch.Generator().manual_seed(way.seed + first + i) for i in range(len(prompts))]
        started = time.perf_counter()
        images = pipe(prompts, num_inference_steps=way.steps, guidance_scale=guidance, generator=generators).images
        return images, time.perf_counter() - started
    finally:
        unload(pipe)


def verdicts(judge: Any, images: list[Image.Image], prompts: list[str]) -> list[bool]:
    """Whether all that a prompt asks for is right."""
    return [all(v is not False for v in column) for column in zip(*judge.score(images, prompts).values(), strict=True)]


def own_half(A: torch.Tensor, pairs: list[scenes.Pair]) -> torch.Tensor:
    """Of maps [steps, batch, 2, h, w] the share that lies in the half where the object is asked for: [steps, 2 * batch]."""
    masks = torch.zeros(len(pairs), 2, *A.shape[-2:])
    middle = A.shape[-1] // 2
    for p, pair in enumerate(pairs):
        for m, each in enumerate(pair):
            across, half = each.place in ("left", "right"), slice(0, middle) if each.place in ("left", "top") else slice(middle, None)
            masks[(p, m, slice(None), half) if across else (p, m, half)] = 1
    return ((A * masks).sum((-2, -1)) / A.sum((-2, -1))).flatten(1)


def watch(pipe: Any, alpha: float, steps: int, prompts: list[str], pairs: list[scenes.Pair], guidance: float) -> dict[str, Any]:
    """Losses and maps over a run of one batch, corrected with ``alpha`` (1e-9: not at all)."""
    plugin = Watched(alpha=alpha)
    make(pipe, Way("", [plugin], steps), prompts, 0, guidance)
    A = torch.stack(plugin.seen)
    inside = own_half(A, pairs)
    error = inside.std(1) / inside.shape[1] ** 0.5
    return {"A": A, "losses": plugin.L.mean(1).tolist(), "own_half": inside.mean(1).tolist(), "own_half_error": error.tolist()}


def tile(x: torch.Tensor, side: int) -> Image.Image:
    """A map as a picture, its least value black and its largest white."""
    x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-12)
    return Image.fromarray((255 * x).numpy().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def draw_maps(found: dict[str, dict[str, Any]], pairs: list[scenes.Pair], path: Path, samples: int = 3, side: int = 64) -> None:
    """Rows: plain and corrected; columns: for each of the first samples both objects' maps at the first, middle and last step."""
    edge, top = 130, 34
    steps = len(next(iter(found.values()))["A"])
    at = [0, steps // 2, steps - 1]
    sheet = Image.new("RGB", (edge + samples * (6 * side + 16), top + len(found) * (side + 6)), "white")
    pencil = ImageDraw.Draw(sheet)
    for s in range(samples):
        for m in range(2):
            x = edge + s * (6 * side + 16) + 3 * m * side
            pencil.text((x + 2, 2), f"{pairs[s][m].object}, {pairs[s][m].place}", fill="black", font_size=13)
            pencil.text((x + 2, 18), "step " + ", ".join(str(i + 1) for i in at), fill="black", font_size=11)
            for row, result in enumerate(found.values()):
                for k, i in enumerate(at):
                    sheet.paste(tile(result["A"][i, s, m], side - 2), (x + k * side, top + row * (side + 6)))
    for row, label in enumerate(found):
        pencil.text((4, top + row * (side + 6) + side // 2 - 8), label, fill="black", font_size=13)
    sheet.save(path, optimize=True)


def draw_grid(ways: list[Way], right: list[list[bool]], prompts: list[str], path: Path, columns: int = 10, side: int = 96) -> None:
    """A row for each way; first the prompts whose verdict the second way changes. A red frame: not as asked."""
    edge, top = 150, 60
    order = sorted(range(len(prompts)), key=lambda i: (right[0][i] == right[1][i], right[0][i], i))[:columns]
    sheet = Image.new("RGB", (edge + len(order) * side, top + len(ways) * side), "white")
    pencil = ImageDraw.Draw(sheet)
    for column, i in enumerate(order):
        words = prompts[i].split(" on a")[0].replace(" and ", "\nand ").replace(" on the ", "\non the ").replace(" at the ", "\nat the ")
        pencil.multiline_text((edge + column * side + 2, 2), words, fill="black", font_size=10, spacing=1)
        for row, way in enumerate(ways):
            picture = way.images[i].resize((side - 6, side - 6), Image.Resampling.NEAREST)
            x, y = edge + column * side, top + row * side
            pencil.rectangle((x, y, x + side - 2, y + side - 2), fill="white" if right[row][i] else "red")
            sheet.paste(picture, (x + 2, y + 2))
    for row, way in enumerate(ways):
        pencil.multiline_text((4, top + row * side + 30), way.label.replace(", ", ",\n"), fill="black", font_size=13)
    sheet.save(path, optimize=True)


def row_of(way: Way, right: list[bool], likely: list[float], plain: Way, plain_right: list[bool]) -> dict[str, Any]:
    """A line of the table."""
    result = share(right)
    assert result is not None
    return {
        "way": way.label,
        "steps": way.steps,
        "seconds": way.time,
        "ratio": statistics.median(a / b for a, b in zip(way.seconds, plain.seconds, strict=True)),
        "judge": vars(result),
        "fixed": sum(new and not old for new, old in zip(right, plain_right, strict=True)),
        "lost": sum(old and not new for new, old in zip(right, plain_right, strict=True)),
        "log_likelihood": statistics.mean(likely),
    }


def main(
    prompts: Annotated[int, typer.Option(help="held-out pairs")] = 96,
    steps: int = 20,
    guidance: float = 2.0,
    alpha: Annotated[str, typer.Option(help="step sizes, by comma; the first is stacked with DeepCache")] = "20,5",
    interval: Annotated[int, typer.Option(help="DeepCache's")] = 3,
    last: Annotated[int, typer.Option(help="beside every step: only so many first steps")] = 5,
    threads: int = 1,
    out: Annotated[Path, typer.Option(help="folder for two_objects.json, grid.png, maps.png")] = Path("two_objects"),
) -> None:
    """The tables of the README."""
    torch.set_num_threads(threads)
    console = Console(width=160)
    pairs = held_out_pairs(prompts)
    texts = [scenes.pair_caption(pair) for pair in pairs]
    judge, pipe = load_bundled(), load_pipeline("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    unload(pipe)
    out.mkdir(parents=True, exist_ok=True)

    found = {label: watch(pipe, a, steps, texts[:BATCH], pairs[:BATCH], guidance) for label, a in [
        ("plain", 1e-9), *((f"A-STAR, alpha {a}", float(a)) for a in alpha.split(","))]}  # fmt: skip
    draw_maps(found, pairs, out / "maps.png")
    for label, result in found.items():
        columns = list(zip(result["losses"], result["own_half"], result["own_half_error"], strict=True))
        line = [f"{loss:.4f} ({inside:.3f} +- {error:.3f})" for loss, inside, error in (columns[i] for i in (0, 1, steps // 2, -1))]
        console.print(f"{label}: loss (share of a map in its object's half) at steps 1, 2, the middle and the last: {', '.join(line)}")

    sizes = [float(a) for a in alpha.split(",")]
    cache = ("deepcache", {"interval": interval})
    plain = Way("plain", [], steps)
    stars = [Way(f"A-STAR, alpha {a:g}", [("a_star", {"alpha": a})], steps) for a in sizes]
    first_steps = Way(f"A-STAR, alpha {sizes[0]:g}, {last} steps", [("a_star", {"alpha": sizes[0], "last": last})], steps)
    cached, both = Way("DeepCache", [cache], steps), Way("A-STAR + DeepCache", [("a_star", {"alpha": sizes[0]}), cache], steps)
    again = Way("plain, other seeds", [], steps, ELSEWHERE)
    times = {way.label: min(make(pipe, way, texts[:BATCH], 0, guidance)[1] for _ in range(2)) for way in (plain, stars[0])}
    same_time = round(steps * times[stars[0].label] / times[plain.label])
    longer = Way(f"plain, {same_time} steps (same time)", [], same_time)
    ways = [plain, *stars, first_steps, longer, cached, both, again]
    for number, begin in enumerate(range(0, prompts, BATCH)):
        for way in ways if number % 2 == 0 else ways[::-1]:
            images, seconds = make(pipe, way, texts[begin : begin + BATCH], begin, guidance)
            way.images += images
            way.seconds.append(seconds * BATCH / len(images))
        console.print(f"{begin + BATCH} of {prompts}")

    right = {way.label: verdicts(judge, way.images, texts) for way in ways}
    likely = {way.label: judge.likelihood(way.images, texts) for way in ways}
    rows = [row_of(way, right[way.label], likely[way.label], plain, right["plain"]) for way in ways]
    first, second = ((right[k], likely[k]) for k in ("plain", again.label))
    better = [a if p >= q else b for a, b, p, q in zip(first[0], second[0], first[1], second[1], strict=True)]
    twice = Way("plain, better of two seeds", [], steps, 0, [], [a + b for a, b in zip(plain.seconds, again.seconds, strict=True)])
    rows.append(row_of(twice, better, [max(pair) for pair in zip(first[1], second[1], strict=True)], plain, right["plain"]))
    named = {row["way"]: row for row in rows}
    star, cache_alone, alone = (named[way.label] for way in (stars[0], cached, plain))
    parts = {
        "time": star["ratio"] * cache_alone["ratio"],
        "time_sum": star["ratio"] - 1 + cache_alone["ratio"],
        "judge": star["judge"]["share"] * cache_alone["judge"]["share"] / alone["judge"]["share"],
    }
    table = Table(title=f"emoji-sd, {prompts} held-out pairs, {steps} steps, guidance {guidance:g}")
    for name in ("way", "steps", "s a picture", "time", "both objects as asked", "fixed", "lost", "log-likelihood"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        j = row["judge"]
        table.add_row(row["way"], str(row["steps"]), f"{row['seconds']:.2f}", f"{row['ratio']:.2f}x",
                      f"{j['right']}/{j['total']} = {j['share']:.0%} ({j['low']:.0%}-{j['high']:.0%})", str(row["fixed"]), str(row["lost"]),
                      f"{row['log_likelihood']:.3f}")  # fmt: skip
    console.print(table)
    console.print(
        f"A-STAR + DeepCache, product of its parts: time {parts['time']:.2f}x, judge {parts['judge']:.0%}; sum of what both add: "
        f"{parts['time_sum']:.2f}x"
    )
    shown = [plain, *stars, both]
    draw_grid(shown, [right[way.label] for way in shown], texts, out / "grid.png")
    watched = {label: {k: v for k, v in result.items() if k != "A"} for label, result in found.items()}
    about = {"prompts": prompts, "steps": steps, "guidance": guidance, "threads": threads, "torch": torch.__version__,
             "diffusers": diffusers.__version__, "python": platform.python_version()}  # fmt: skip
    text = json.dumps({"about": about, "rows": rows, "product_of_parts": parts, "watched": watched}, indent=1)
    (out / "two_objects.json").write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
