"""Held-out edits of emoji-edit, of which the true result is known pixel by pixel: which of N seeds a choice takes, and what that is worth.

    python plugins/elect/benchmarks/edits.py --edits 24 --out chosen

Every seed of every edit is run to its end once, with the predictions and predicted clean samples of all steps kept. So each way to choose
is judged on the same pictures: the plugin's winner is bit for bit one of them, which is checked on the first edits by running the plugin.
The arms of 60 forwards: ELECT with 6 candidates at step 8 of 20, best of 3 whole runs, and one run of 60 steps.

"Outside the edit" are the pixels in which the source and the true result agree: of an edit of the background those of the object.
Writes OUT.csv (a row for each picture) and OUT.png.
"""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import typer
from diffgraft import DenoiseCall, Effects, Paper, Plugin, StepCall, load_pipeline
from diffgraft.lab.metrics import Mean
from diffgraft.lab.pictures import draw_grid
from diffgraft.methods.decoding import to_pixels
from diffgraft.methods.predictions import clean_estimate, known_kind, levels_of
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import bundled_once
from diffgraft_checkpoints.train.edit import Task, held_out_tasks
from diffgraft_elect import share_of, source_latents
from diffgraft_elect.method import Space, difference, inconsistency, step_map
from diffgraft_elect.seeds import starts_of
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

SPACES: tuple[Space, ...] = ("latent", "pixel")
console = Console(width=170)


class Tap(Plugin):
    """Keeps what a choice at any step would see."""

    name = "tap"
    paper = Paper("none", "", "watches")
    families = ("sd_edit",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"latents"}))
    d: ClassVar[list[Tensor]] = []
    x0: ClassVar[list[Tensor]] = []
    source: ClassVar[list[Tensor]] = []

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        out: Tensor = next(call)
        parts = dict(zip(call.branches, out.chunk(len(call.branches)), strict=True))
        self.d.append(difference(parts["cond"], parts["image"]))
        self.source[:] = [source_latents(call.pipe, call.only("cond").sample[:1, call.latents.shape[1] :])]
        return out

    def step(self, call: StepCall, next: Any) -> Any:
        self.x0.append(clean_estimate(call.sample, call.model_output, levels_of(call), known_kind(call.family, call.pipe.scheduler)))
        return next(call)


def scores(pipe: Any, space: Space, steps: int) -> list[list[float]]:
    """BIS of each seed after 1, 2, ... steps."""
    family = pipe.plugins.family

    @torch.no_grad()
    def seen(latents: Tensor) -> Tensor:
        return latents if space == "latent" else to_pixels(pipe, family, latents, {})

    maps = torch.stack([step_map(d.mean(0, keepdim=True), space) for d in Tap.d])
    window, source = share_of(0.2, steps), seen(Tap.source[0])
    return [inconsistency(seen(x0), source, maps[: min(window, s)].mean(0), space).tolist() for s, x0 in enumerate(Tap.x0, 1)]


def psnr(image: Image.Image, truth: Image.Image, where: Any) -> float:
    """In dB, over the pixels ``where`` is true."""
    error = (np.asarray(image, dtype=np.float64) - np.asarray(truth))[where]
    return float(10 * np.log10(255**2 / max(float(np.mean(error**2)), 1e-10)))


def measured(task: Task, images: list[Image.Image]) -> list[dict[str, float]]:
    """Every figure of these results of one edit."""
    before, after = scenes.render(task.before), scenes.render(task.after)
    kept = (np.asarray(before) == np.asarray(after)).all(-1)
    verdicts = bundled_once().score(images, [task.caption] * len(images))
    rows = []
    for i, image in enumerate(images):
        right = {name: bool(of_field[i]) for name, of_field in verdicts.items() if of_field[i] is not None}
        rows.append(
            {
                "outside": psnr(image, after, kept),
                "inside": psnr(image, after, ~kept),
                "all": psnr(image, after, np.ones_like(kept)),
                "edited": float(right[task.kind]),
                "right": float(all(right.values())),
            }
        )
    return rows


def main(
    edits: Annotated[int, typer.Option(help="Held-out edits, as many of each of the four kinds.", min=4)] = 24,
    steps: Annotated[int, typer.Option(help="Steps of a run.", min=1)] = 20,
    candidates: Annotated[int, typer.Option(help="N.", min=2)] = 6,
    proofs: Annotated[int, typer.Option(help="Edits on which the plugin itself is run beside.", min=0)] = 2,
    out: Annotated[Path, typer.Option(help="Where to write, without suffix.")] = Path("chosen"),
) -> None:
    """Run, choose, judge."""
    pipe = load_pipeline("emoji-edit", plugins=[Tap])
    pipe.set_progress_bar_config(disable=True)
    s = share_of(0.4, steps)
    fewer = (candidates * s + steps - s) // steps
    tasks = held_out_tasks(edits // 4, 0)
    tasks = [tasks[kind * (edits // 4) + i] for i in range(edits // 4) for kind in range(4)]
    lines: list[dict[str, Any]] = []
    shown: list[tuple[Task, list[Image.Image], dict[str, int]]] = []
    began = time.perf_counter()
    for number, task in enumerate(tasks):
        starts = starts_of(torch.Generator().manual_seed(number), 1, candidates)
        Tap.d.clear()
        Tap.x0.clear()
        source = scenes.render(task.before)
        images = pipe(
            [task.instruction] * candidates, image=[source] * candidates, num_inference_steps=steps, generator=starts.of(range(candidates))
        ).images
        bis = {space: scores(pipe, space, steps) for space in SPACES}
        longer = pipe(task.instruction, image=source, num_inference_steps=fewer * steps, generator=starts.of([0])).images
        for seed, row in enumerate(measured(task, [*images, *longer])):
            line: dict[str, Any] = {"edit": number, "kind": task.kind, "said": task.instruction, "seed": seed, **row}
            if seed < candidates:
                line |= {f"{space} {i + 1}": bis[space][i][seed] for space in SPACES for i in range(steps)}
            lines.append(line)
        winners = {space: int(np.argmin(bis[space][s - 1])) for space in SPACES}
        shown.append((task, images, winners))
        if number < proofs:
            prove(pipe, task, number, images, winners, candidates, steps, s)
        if number == 0:
            console.print(f"{time.perf_counter() - began:.1f} s an edit", highlight=False)
    with out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    tell(lines, candidates, steps, s, fewer)
    picture(shown, fewer, s, out.with_suffix(".png"))


def prove(
    pipe: Any, task: Task, number: int, images: list[Image.Image], winners: dict[Space, int], candidates: int, steps: int, s: int
) -> None:
    """The plugin chooses the same seed, makes the same picture, and asks the denoiser N s + (T - s) times."""
    pipe.plugins.clear()
    for space, winner in winners.items():
        load_pipeline(pipe, plugins={"elect": {"candidates": candidates, "space": space}})
        generator = torch.Generator().manual_seed(number)
        [image] = pipe(task.instruction, image=scenes.render(task.before), num_inference_steps=steps, generator=generator).images
        report = pipe.plugins.report()
        assert int(report.plugins["elect"].records["bis"].argmin()) == winner, report
        assert sum(report.forwards.values()) == candidates * s + steps - s, report.forwards
        far = np.abs(np.asarray(image, dtype=int) - np.asarray(images[winner])).max()
        assert far <= 1, far
        console.print(f"edit {number}, {space}: the plugin takes seed {winner} too, off by {far} of 255, forwards {report.forwards}")
        pipe.plugins.clear()
    load_pipeline(pipe, plugins=[Tap])


def tell(lines: list[dict[str, Any]], candidates: int, steps: int, s: int, fewer: int) -> None:
    """The tables."""
    numbers = sorted({line["edit"] for line in lines})
    by_edit = [[line for line in lines if line["edit"] == number] for number in numbers]
    groups = [range(i, i + fewer) for i in range(0, candidates - fewer + 1, fewer)]
    names = ("outside", "inside", "all", "edited", "right")

    def chosen(of_edit: list[dict[str, Any]], column: str, among: range) -> dict[str, Any]:
        return min((of_edit[i] for i in among), key=lambda line: line[column])

    def over(of_edit: list[dict[str, Any]], name: str, column: str, groups: list[range]) -> float:
        return float(np.mean([chosen(of_edit, column, among)[name] for among in groups]))

    arms: dict[str, tuple[int, dict[str, list[float]]]] = {
        "one seed (mean of all)": (
            steps, {n: [float(np.mean([line[n] for line in e[:candidates]])) for e in by_edit] for n in names}
        ),
        f"one seed, {fewer * steps} steps": (fewer * steps, {n: [e[candidates][n] for e in by_edit] for n in names}),
    }  # fmt: skip
    for space in SPACES:
        best = {n: [over(e, n, f"{space} {steps}", groups) for e in by_edit] for n in names}
        arms[f"best of {fewer}, whole runs, {space}"] = fewer * steps, best
    for space in SPACES:
        elect = {n: [chosen(e, f"{space} {s}", range(candidates))[n] for e in by_edit] for n in names}
        arms[f"ELECT {candidates} seeds, s = {s}, {space}"] = candidates * s + steps - s, elect
    for space in SPACES:
        whole = {n: [chosen(e, f"{space} {steps}", range(candidates))[n] for e in by_edit] for n in names}
        arms[f"best of {candidates}, whole runs, {space}"] = candidates * steps, whole
    oracle = {n: [max(e[:candidates], key=lambda line: line["outside"])[n] for e in by_edit] for n in names}
    arms[f"best of {candidates} by the truth"] = candidates * steps, oracle
    one, best_of = arms["one seed (mean of all)"][1], arms[f"best of {fewer}, whole runs, latent"][1]
    compared = ("outside: more than one seed", f"more than best of {fewer} (latent)")
    table = Table("arm", "forwards", *names, *compared, title=f"{len(numbers)} edits")
    for arm, (forwards, found) in arms.items():
        more = [Mean.of(np.array(found["outside"]) - np.array(base["outside"])) for base in (one, best_of)]
        told = [f"{float(np.mean(found[n])):.2f}" for n in names]
        table.add_row(arm, str(forwards), *told, *(f"{m.mean:+.2f} ({m.low:+.2f} to {m.high:+.2f})" for m in more))
    console.print(table)
    kinds = sorted({line["kind"] for line in lines})
    part = Table("arm", *kinds, title="outside, by kind of edit: more than one seed, dB")
    for arm, (_, found) in arms.items():
        row = []
        for kind in kinds:
            at = [i for i, e in enumerate(by_edit) if e[0]["kind"] == kind]
            row.append(f"{float(np.mean([found['outside'][i] - one['outside'][i] for i in at])):+.2f}")
        part.add_row(arm, *row)
    console.print(part)
    curve = Table("chosen after step", *(f"{space}: {what}" for space in SPACES for what in ("outside", "forwards", "rank correlation")))
    for at in sorted({1, 2, 4, 6, s, 12, 16, steps}):
        if at > steps:
            continue
        row = [str(at)]
        for space in SPACES:
            more = [chosen(e, f"{space} {at}", range(candidates))["outside"] - o for e, o in zip(by_edit, one["outside"], strict=True)]
            m = Mean.of(np.array(more))
            ranks = [rank(e[:candidates], f"{space} {at}") for e in by_edit]
            row += [f"{m.mean:+.2f} ({m.low:+.2f} to {m.high:+.2f})", str(candidates * at + steps - at), f"{np.mean(ranks):+.2f}"]
        curve.add_row(*row)
    console.print(curve)


def rank(of_edit: list[dict[str, Any]], column: str) -> float:
    """Spearman's correlation of a score with the error outside the edit."""
    a, b = [np.argsort(np.argsort([line[name] * sign for line in of_edit])) for name, sign in ((column, 1), ("outside", -1))]
    return float(np.corrcoef(a, b)[0, 1])


def picture(shown: list[tuple[Task, list[Image.Image], dict[str, int]]], fewer: int, s: int, path: Path) -> None:
    """The first edits: source, truth, the first seed, ELECT's in either space, all other seeds."""
    part = shown[:8]
    rows = [
        (["source"], [scenes.render(task.before) for task, _, _ in part]),
        (["true edit"], [scenes.render(task.after) for task, _, _ in part]),
        (["first seed"], [images[0] for _, images, _ in part]),
        *(([f"ELECT, {space}"], [images[winners[space]] for _, images, winners in part]) for space in SPACES),
    ]
    footer = f"chosen after step {s}; emoji-edit, the same seeds in every row"
    draw_grid("ELECT on held-out edits", footer, [task.instruction for task, _, _ in part], rows, side=128).quantize(128).save(path)


if __name__ == "__main__":
    typer.run(main)
