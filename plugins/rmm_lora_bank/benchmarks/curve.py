"""Bytes against error: six style LoRA of emoji-sd in a bank, beside each LoRA cut by its own SVD to the same bytes, and peft's merges.

    python plugins/rmm_lora_bank/benchmarks/curve.py --styles styles/ --out curve.png

What is missing of the LoRA is learned first (`styles.py`, about two minutes of one core a style); the measurement takes about three.
`--one-start` is for LoRA that began with the same random weights.

Two errors, each 0 for the LoRA itself. Of the weights: || dW - dW' || / || dW || over all layers, mean over the tasks. Of the pictures:
RMS distance of a picture to the one that the LoRA itself draws from the same prompt and seed, as a share of the plain model's distance to
it (1: as far off as without any LoRA). "kept": of the pictures of all LoRA and of the plain model for the same prompt and seed, the nearest
is its own. Intervals are 95 %: bootstrap over pictures, Wilson's for shares. "rows" is the paper's own basis as far as we know it; a merge
is one LoRA for all tasks, with the rank of as many bytes and the better of the weights 1 and 1/N.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.lab.metrics import Mean, share
from diffgraft.lab.pictures import draw_grid
from diffgraft_checkpoints.emoji import scenes
from diffgraft_rmm_lora_bank import build_bank, method
from diffgraft_rmm_lora_bank.build import Factors, Tally, layers_of, read_loras
from diffgraft_rmm_lora_bank.method import Update
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from PIL import Image
from rich.console import Console
from rich.table import Table
from styles import STYLES, learned

console = Console(width=150)
MERGES: dict[str, Any] = {
    "svd": task_arithmetic,
    "ties_svd": lambda deltas, weights: ties(deltas, weights, density=0.5),
    "dare_linear_svd": lambda deltas, weights: dare_linear(deltas, weights, density=0.5),
    "dare_ties_svd": lambda deltas, weights: dare_ties(deltas, weights, density=0.5),
}
"""peft's functions behind `add_weighted_adapter(combination_type=...)`."""


class Bench:
    """The pipeline, the six LoRA, and what they draw."""

    def __init__(self, files: dict[str, Path], pictures: int, steps: int) -> None:
        self.pipe: Any = unload(load_pipeline("emoji-sd"))
        self.pipe.set_progress_bar_config(disable=True)
        self.files, self.steps = files, steps
        attribute, self.read = read_loras(self.pipe, files)
        self.layers: Factors = layers_of(self.pipe.unet, attribute, self.read)
        self.shapes = {path: self.pipe.unet.get_submodule(path).weight.shape for path in self.layers}
        held = scenes.split()[1]
        chosen = np.random.default_rng(46).choice(len(held), pictures, replace=False)
        self.prompts = [scenes.caption(held[i]) for i in chosen]
        self.item = next(iter(self.read[next(iter(files))].tensors.values())).element_size()
        self.lora_bytes = self.item * sum(self.numbers(path) * x.rank for path, xs in self.layers.items() for x in xs)

    def numbers(self, path: str) -> int:
        """Numbers that one rank takes in a layer."""
        x = self.layers[path][0]
        return x.B.shape[0] + x.A.shape[1]

    def draw(self) -> np.ndarray:
        """Pictures [prompts, 64, 64, 3] in 0..1, prompt i from seed i."""
        generators = [torch.Generator().manual_seed(i) for i in range(len(self.prompts))]
        return np.asarray(self.pipe(self.prompts, num_inference_steps=self.steps, generator=generators, output_type="np").images)

    def drawn_with(self, task: int, cut: Factors) -> np.ndarray:
        """The same with other updates in the place of a task's LoRA."""
        tensors = {}
        for path, updates in cut.items():
            B, A = updates[task]
            if A.shape[0]:
                shape = self.shapes[path]
                tensors[f"unet.{path}.lora_A.weight"] = A.float().reshape(-1, *shape[1:])
                tensors[f"unet.{path}.lora_B.weight"] = B.float().reshape(shape[0], -1, *[1] * (len(shape) - 2))
        load_pipeline(self.pipe, plugins={"rmm_lora_bank": {"bank": tensors}})
        try:
            return self.draw()
        finally:
            unload(self.pipe)

    def errors(self, cut: Factors) -> list[float]:
        """|| dW - dW' || / || dW || of each task."""
        off, one = Tally(len(self.files)), torch.ones(1, dtype=torch.float64)
        for path, xs in self.layers.items():
            off.add([method.norm(x) for x in xs], [method.residual(x, [y], one) for x, y in zip(xs, cut[path], strict=True)])
        return off.shares()


def cut_alone(bench: Bench, budget: dict[str, int]) -> Factors:
    """Each LoRA cut by its own SVD, a layer's ranks given to the largest singular values."""
    return {path: method.alone(xs, budget[path]) for path, xs in bench.layers.items()}


def by_rows(bench: Bench, p: int) -> tuple[Factors, int]:
    """(each LoRA with the rows of its factors approximated position by position, numbers kept)."""
    out, numbers = {}, 0
    for path, xs in bench.layers.items():
        r = max(x.rank for x in xs)
        B, A = torch.stack([x.B for x in xs], 1), torch.stack([x.A.T for x in xs], 1)
        out[path] = [Update(b, a.T) for b, a in zip(method.rows(B, p).unbind(1), method.rows(A, p).unbind(1), strict=True)]
        numbers += (B.shape[0] + A.shape[0]) * p * (r + len(xs))
    return out, numbers


def merged(bench: Bench, kind: str, budget: dict[str, int]) -> Factors:
    """One LoRA for all tasks by a merge of peft, cut to the ranks of ``budget``."""
    best: tuple[float, Factors] | None = None
    for weight in (1.0, 1 / len(bench.files)):
        torch.manual_seed(0)
        made: Factors = {}
        for path, xs in bench.layers.items():
            whole = MERGES[kind]([(x.B @ x.A).float() for x in xs], torch.full((len(xs),), weight))
            U, s, Vh = torch.linalg.svd(whole.double(), full_matrices=False)
            rank = min(budget[path], len(s))
            made[path] = [Update(U[:, :rank] * s[:rank], Vh[:rank])] * len(xs)
        error = sum(bench.errors(made))
        best = (error, made) if best is None or error < best[0] else best
    assert best is not None
    return best[1]


def main(
    styles: Annotated[Path, typer.Option(help="Folder of the six LoRA.")] = Path("styles"),
    pictures: Annotated[int, typer.Option(help="Pictures of each task.")] = 6,
    steps: Annotated[int, typer.Option(help="Steps of a picture.")] = 8,
    one_start: Annotated[bool, typer.Option("--one-start", help="Where LoRA are missing: all begin with the same weights.")] = False,
    out: Annotated[Path, typer.Option(help="Grid of pictures; the figures lie beside it as JSON.")] = Path("curve.png"),
) -> None:
    """Measure every arm, print the table, draw the grid."""
    files = learned(styles, one_start=one_start)
    bench, N = Bench(files, pictures, steps), len(files)
    plain = bench.draw()
    truth = []
    for task in files:
        bench.pipe.load_lora_weights(files[task])
        truth.append(bench.draw())
        bench.pipe.unload_lora_weights()
    table = Table(
        "arm",
        "bytes",
        "of the LoRA",
        "error of the weights",
        "error of the pictures",
        "kept",
        title=f"{N} LoRA, {bench.lora_bytes:,} bytes",
    )
    kept_pictures: dict[str, list[np.ndarray]] = {"plain": [plain] * N, "LoRA": truth}
    figures: list[dict[str, Any]] = []

    def note(name: str, size: int, errors: list[float], drawn: list[np.ndarray]) -> None:
        def far(x: np.ndarray, y: np.ndarray) -> np.ndarray:
            return np.sqrt(np.square(x - y).reshape(len(x), -1).mean(1))

        off = Mean.of(np.concatenate([far(drawn[i], truth[i]) / far(plain, truth[i]) for i in range(N)]).tolist())
        nearest = [np.argmin([far(drawn[i], each) for each in [*truth, plain]], axis=0) == i for i in range(N)]
        kept = share(np.concatenate(nearest).tolist())
        weights = sum(errors) / N
        figures.append({"arm": name, "bytes": size, "weights": errors, "pictures": [off.mean, off.low, off.high], "kept": str(kept)})
        table.add_row(
            name,
            f"{size:,}",
            f"{size / bench.lora_bytes:.0%}",
            f"{weights:.3f}",
            f"{off.mean:.2f} ({off.low:.2f} to {off.high:.2f})",
            str(kept),
        )
        kept_pictures[name] = drawn
        console.print(name, f"{weights:.3f} {off.mean:.2f}", highlight=False)

    budgets = {}
    for p, rank in ((1, None), (2, None), (3, None), (N, 2), (N, 4), (N, "full")):
        bank = build_bank(bench.pipe, files, p, rank, larger=True)
        load_pipeline(bench.pipe, plugins={"rmm_lora_bank": {"bank": bank, "task": 0}})
        drawn = []
        for task in files:
            bench.pipe.plugins.configure("rmm_lora_bank", task=task)
            drawn.append(bench.draw())
        unload(bench.pipe)
        note(f"bank, p = {p}" + (f", rank {rank}" if rank else ""), bank.table.bytes, bank.table.about.errors, drawn)
        if p == N:
            continue
        budgets[p] = {path: sum(ranks) for path, ranks in bank.table.about.ranks.items()}
        cut = cut_alone(bench, budgets[p])
        size = bench.item * sum(bench.numbers(path) * sum(x.rank for x in xs) for path, xs in cut.items())
        note(f"each cut alone, as p = {p}", size, bench.errors(cut), [bench.drawn_with(i, cut) for i in range(N)])
    for p in (1, 2):
        rows, numbers = by_rows(bench, p)
        note(f"rows, p = {p}", bench.item * numbers, bench.errors(rows), [bench.drawn_with(i, rows) for i in range(N)])
    size = bench.item * sum(bench.numbers(path) * rank for path, rank in budgets[2].items())
    for kind in MERGES:
        cut = merged(bench, kind, budgets[2])
        note(f"merge {kind}", size, bench.errors(cut), [bench.drawn_with(0, cut)] * N)
    console.print(table)
    out.with_suffix(".json").write_text(
        json.dumps({"lora_bytes": bench.lora_bytes, "pictures": pictures, "steps": steps, "arms": figures}, indent=1)
    )

    def image(x: np.ndarray) -> Image.Image:
        return Image.fromarray((x * 255).round().astype(np.uint8))

    labels = [
        "plain",
        "LoRA",
        "bank, p = 3",
        "each cut alone, as p = 3",
        "bank, p = 2",
        "each cut alone, as p = 2",
        "rows, p = 2",
        "merge ties_svd",
    ]
    rows_shown = [([label], [image(each[i % pictures]) for i, each in enumerate(kept_pictures[label])]) for label in labels]
    footer = f"emoji-sd, {steps} steps; a column is one task, prompt and seed; p = 2 and 3 of {N} keep a third and a half of the bytes"
    draw_grid("Six LoRA in a bank, and the same bytes spent on each alone", footer, list(STYLES), rows_shown, side=96).save(
        out, optimize=True
    )


if __name__ == "__main__":
    typer.run(main)
