"""Are there golden seeds on emoji-sd? The best and the worst tenth of a pool, on prompts that did not rank them.

    python plugins/golden_seed/benchmarks/tenths.py --out tenths

Every seed of the pool draws every caption (two objects each, none of these pairs was trained on: one object alone the models draw right
nearly always). Half of the captions rank the seeds, by the judge's mean log-probability of the caption (what `diffgraft evolve golden_seed
--fitness reward --reward emoji_judge` ranks by), the other half tests them, and then the halves change places. No object of one half is in
the other: the same two objects on another background are drawn alike from one seed, so that halves which share them test a ranking on what
ranked it. What that seems to gain is shown too (`even captions rank, odd ones test`), and what a ranking does on the captions that ranked
it.

    judge     share of pictures in which all is as asked
    score     the judge's mean log-probability of the caption
    Frechet   distance of the judge's features to true renders of the same captions

Intervals: 95 % bootstrap, seeds and test captions redrawn (Frechet: seeds). p: one-sided permutation test, as good a difference between
two tenths chosen by lot. OUT/ holds a file a chunk of seeds, so that an interrupted run goes on, and pictures.csv.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.lab.judging import all_right
from diffgraft.lab.pictures import draw_grid
from diffgraft.methods.fitness import frechet
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import Judge, bundled_once
from diffgraft_checkpoints.train.evaluate import held_out_pairs
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

CHUNK = 10
"""Seeds of one file."""
DRAWS = 10_000
console = Console(width=150)
Rows = np.ndarray


def draw(pipe: Any, prompts: Sequence[str], seed: int, steps: int, guidance: float) -> list[Image.Image]:
    """All captions from one seed: what the plugin does with ``seed``, which its tests hold bit for bit."""
    generators = [torch.Generator().manual_seed(seed) for _ in prompts]
    return list(pipe(list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=generators).images)


def measured(pipe: Any, judge: Judge, prompts: Sequence[str], seeds: int, steps: int, guidance: float, out: Path) -> dict[str, Rows]:
    """right, score [seeds, captions] and features [seeds, captions, d]; what lies in ``out`` is not drawn again."""
    parts = []
    for first in track(range(0, seeds, CHUNK), "seeds", console=console, disable=not console.is_terminal):
        path = out / f"{first:05}.npz"
        if not path.exists():
            rows: dict[str, list[Any]] = {"right": [], "score": [], "features": []}
            for seed in range(first, min(first + CHUNK, seeds)):
                images = draw(pipe, prompts, seed, steps, guidance)
                rows["right"].append(all_right(judge.score(images, prompts)))
                rows["score"].append(judge.likelihood(images, prompts))
                rows["features"].append(judge.features(images).numpy())
            unfinished = path.with_suffix(".part.npz")
            np.savez(unfinished, **{name: np.asarray(row) for name, row in rows.items()})
            unfinished.rename(path)
            print(f"{first + len(rows['right'])} seeds", flush=True)
        with np.load(path) as file:
            parts.append(dict(file))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


# what they are worth ------------------------------------------------------------------------------------------------------------------


def tenths(score: Rows) -> tuple[Rows, Rows]:
    """The best and the worst tenth of the seeds by their mean over the captions [seeds, captions]."""
    order = np.argsort(-score.mean(1), kind="stable")
    size = max(1, len(order) // 10)
    return order[:size], order[-size:]


def bootstrap(values: Rows, best: Rows, worst: Rows, draws: int = DRAWS) -> Rows:
    """Best mean, worst mean, difference [draws, 3] with seeds of either tenth, and captions, redrawn."""
    rng = np.random.default_rng(0)
    captions = rng.integers(values.shape[1], size=(draws, values.shape[1]))
    means = []
    for group in (best, worst):
        seeds = group[rng.integers(len(group), size=(draws, len(group)))]
        means.append(np.array([values[np.ix_(s, c)].mean() for s, c in zip(seeds, captions, strict=True)]))
    return np.stack([*means, means[0] - means[1]], 1)


def by_lot(difference: Callable[[Rows, Rows], float], seeds: int, size: int, draws: int) -> Rows:
    """The same difference for two tenths that are drawn by lot [draws]."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(draws):
        order = rng.permutation(seeds)
        found.append(difference(order[:size], order[size : 2 * size]))
    return np.array(found)


def p_value(seen: float, chance: Rows) -> float:
    """How often chance gives as large a difference: (k + 1) / (n + 1)."""
    return float((np.sum(chance >= seen - 1e-12) + 1) / (len(chance) + 1))


def small(p: float) -> str:
    """A p value for people."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def renders(pairs: Sequence[Any], numbers: Sequence[int]) -> list[Image.Image]:
    """Twenty true pictures of each of these captions."""
    return [
        scenes.render(*scenes.sample_pair(pair, np.random.default_rng([21, int(i), k])))
        for pair, i in zip(pairs, numbers, strict=True)
        for k in range(20)
    ]


def told(value: float, draws: Rows, form: str) -> str:
    """A value with its 95 % interval."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{value:{form}} ({low:{form}} to {high:{form}})"


def rows_of(found: dict[str, Rows], ranks: Rows, tests: Rows, true: torch.Tensor, draws: int) -> list[list[str]]:
    """The table for one ranking: quantity, best tenth, worst tenth, all seeds, difference, p."""
    best, worst = tenths(found["score"][:, ranks])
    rows = []
    for name, key, form in (("judge", "right", ".3f"), ("score", "score", ".3f")):
        values = found[key][:, tests].astype(np.float64)

        def difference(a: Rows, b: Rows, values: Rows = values) -> float:
            return float(values[a].mean() - values[b].mean())

        redrawn, seen = bootstrap(values, best, worst, draws), difference(best, worst)
        p = p_value(seen, by_lot(difference, len(values), len(best), draws))
        told_all = [told(v, r, form) for v, r in zip((values[best].mean(), values[worst].mean()), redrawn.T[:2], strict=True)]
        rows.append([name, *told_all, f"{values.mean():{form}}", told(seen, redrawn[:, 2], "+" + form), small(p)])
    features = torch.from_numpy(found["features"][:, tests]).double()

    def distance(group: Rows) -> float:
        return frechet(features[group].flatten(0, 1), true)

    def closer(a: Rows, b: Rows) -> float:
        return distance(b) - distance(a)

    rng, few = np.random.default_rng(2), max(1, draws // 10)
    redrawn = np.array([[distance(g[rng.integers(len(g), size=len(g))]) for g in (best, worst)] for _ in range(few)])
    values = [distance(best), distance(worst)]
    redrawn += np.asarray(values) - redrawn.mean(0)  # a fit to a resample is worse by itself
    chance = by_lot(closer, len(features), len(best), few)
    seen = values[1] - values[0]
    same = distance(np.random.default_rng(3).permutation(len(features))[: len(best)])
    rows.append(["Frechet", *(told(v, r, ".2f") for v, r in zip(values, redrawn.T, strict=True)), f"{same:.2f}"])
    rows[-1] += [told(-seen, redrawn[:, 0] - redrawn[:, 1], "+.2f"), small(p_value(seen, chance))]
    return rows


def halves(objects: Sequence[frozenset[str]]) -> tuple[Rows, Rows]:
    """Two halves of the captions, none of whose objects is in both: captions that share one, through others too, stay together."""
    groups: list[tuple[set[str], list[int]]] = []
    for i, shown in enumerate(objects):
        joined = [group for group in groups if group[0] & shown]
        groups = [group for group in groups if not group[0] & shown]
        groups.append((set(shown).union(*(group[0] for group in joined)), sorted([i, *(k for group in joined for k in group[1])])))
    parts: tuple[list[int], list[int]] = ([], [])
    for _, members in sorted(groups, key=lambda group: (-len(group[1]), group[1])):
        min(parts, key=len).extend(members)
    return np.array(sorted(parts[0])), np.array(sorted(parts[1]))


def agreement(score: Rows, ranks: Rows, tests: Rows, draws: int) -> tuple[float, float]:
    """Rank correlation over seeds of the means on two sets of captions, and its one-sided p by permutation of the seeds."""
    a, b = (np.argsort(np.argsort(score[:, part].mean(1))).astype(float) for part in (ranks, tests))
    seen = float(np.corrcoef(a, b)[0, 1])
    rng = np.random.default_rng(4)
    chance = np.array([np.corrcoef(a, rng.permutation(b))[0, 1] for _ in range(draws)])
    return seen, p_value(seen, chance)


def main(
    out: Annotated[Path, typer.Option(help="Folder of what was drawn; an interrupted run goes on there.")],
    pipeline: Annotated[str, typer.Option(help="emoji-sd or emoji-sd-small.")] = "emoji-sd",
    seeds: Annotated[int, typer.Option(min=20, help="Seeds of the pool, 0 and up.")] = 200,
    captions: Annotated[int, typer.Option(min=4, help="Captions of two objects: half rank, half test.")] = 24,
    steps: Annotated[int, typer.Option(help="Steps, DDIM.")] = 10,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    draws: Annotated[int, typer.Option(min=100, help="Redraws of bootstrap and permutations (Frechet: a tenth).")] = DRAWS,
    picture: Annotated[bool, typer.Option(help="Draw the best and the worst three seeds side by side.")] = True,
) -> None:
    """Draw, judge, compare."""
    out.mkdir(parents=True, exist_ok=True)
    setting = {"pipeline": pipeline, "captions": captions, "steps": steps, "guidance": guidance}
    noted = out / "setting.json"
    if noted.exists() and json.loads(noted.read_text()) != setting:
        raise typer.BadParameter(f"{out} holds another run, {noted.read_text()}: choose another folder", param_hint="--out")
    noted.write_text(json.dumps(setting))
    judge, pairs = bundled_once(), held_out_pairs(captions)
    prompts = [scenes.pair_caption(each) for each in pairs]
    pipe = unload(load_pipeline(pipeline))
    pipe.set_progress_bar_config(disable=True)
    found = measured(pipe, judge, prompts, seeds, steps, guidance, out)
    with (out / "pictures.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["seed", "caption", "right", "score"])
        for s, i in np.ndindex(found["right"].shape):
            writer.writerow([s, prompts[i], int(found["right"][s, i]), f"{found['score'][s, i]:.6f}"])
    one, other = halves([frozenset(each.object for each in pair) for pair in pairs])
    title = f"{pipeline}, {seeds} seeds, {captions} captions of two objects, DDIM {steps} steps, guidance {guidance:g}"
    even = np.arange(0, captions, 2)
    ways = (
        ("half A ranks, half B tests", one, other),
        ("half B ranks, half A tests", other, one),
        ("even captions rank, odd ones test: some objects are in both, not a result", even, even + 1),
        ("half B ranks and tests: not a result", other, other),
    )
    for how, rank, test in ways:
        true = judge.features(renders([pairs[i] for i in test], test)).double()
        table = Table("", "best tenth", "worst tenth", "all", "best - worst", "p", title=f"{title}\n{how} ({len(rank)}, {len(test)})")
        for row in rows_of(found, rank, test, true, draws):
            table.add_row(*row)
        console.print(table)
        if rank is not test:
            rho, p = agreement(found["score"], rank, test, draws)
            console.print(f"rank correlation of the seeds' scores on both: {rho:+.3f}, p {small(p)}", highlight=False)
    if not picture:
        return
    best, worst = tenths(found["score"][:, one])
    shown, rows = [prompts[i] for i in other[:8]], []
    for name, group in (("best", best[:3]), ("worst", worst[::-1][:3])):
        rows += [([f"{name} {k + 1}", f"seed {s}"], draw(pipe, shown, int(s), steps, guidance)) for k, s in enumerate(group)]
    footer = "captions that did not rank the seeds"
    draw_grid(title, footer, shown, rows, side=128).quantize(128).save(out / "tenths.png")


if __name__ == "__main__":
    typer.run(main)
