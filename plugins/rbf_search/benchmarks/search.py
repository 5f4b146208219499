"""Rollover budget forcing beside best-of-N with as many function evaluations, on a bundled flow pipeline, prompt by prompt.

    python plugins/rbf_search/benchmarks/search.py --out out/rbf      # every arm is kept in --out, a second call makes what is missing
    python plugins/rbf_search/benchmarks/search.py --settings --out out/rbf      # other settings, on the 24 prompts after those

Writes results.json, curve.png (reward against evaluations) and grid.png (a row an arm).
"""

from __future__ import annotations

import json
import math
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import diffusers
import matplotlib as mpl
import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.installed import registry
from diffgraft.lab.metrics import Mean, share
from diffgraft.lab.pictures import draw_grid
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import bundled_once
from diffgraft_checkpoints.train.evaluate import held_out_labels, held_out_pairs
from PIL import Image
from rich.console import Console
from rich.table import Table

mpl.use("agg")
ODE = {"norm": 0.0, "reward": None}
OTHERS = 24
SETTINGS: tuple[tuple[int, dict[str, Any]], ...] = (
    (10, {"interpolant": "linear", "grid": "pipeline", "norm": 3.0, "particles": 12}),
    (10, {"interpolant": "linear", "grid": "pipeline", "norm": 3.5, "particles": 12}),
    (10, {"interpolant": "linear", "grid": "pipeline", "norm": 3.5, "particles": 6}),
    (10, {"interpolant": "linear", "grid": "pipeline", "norm": 3.5, "particles": 20}),
    (6, {"interpolant": "linear", "grid": "pipeline", "norm": 3.0, "particles": 20}),
    (10, {"interpolant": "vp", "grid": "uniform", "norm": 5.0, "particles": 12}),
    (10, {"interpolant": "vp", "grid": "uniform", "norm": 5.0, "particles": 20}),
)
"""Steps and knobs among which a setting is chosen, on prompts that the comparison does not use."""
console = Console(width=150)


class Bench:
    """One pipeline, its prompts, and the ways of making a picture of each."""

    def __init__(self, pipeline: str, prompts: list[str], steps: int, nfe: int, batch: int) -> None:
        self.prompts, self.steps, self.nfe, self.batch = prompts, steps, nfe, batch
        self.call = dict(registry.find_bundled(pipeline).call)
        self.judge = bundled_once()
        self.pipe = load_pipeline(pipeline, plugins={"rbf_search": {}})
        self.pipe.set_progress_bar_config(disable=True)

    def make(self, knobs: dict[str, Any], number: int) -> tuple[list[Image.Image], list[dict[str, Any]]]:
        """Picture ``number`` of every prompt, and the reports' records."""
        self.pipe.plugins.configure("rbf_search", **knobs)
        images: list[Image.Image] = []
        records = []
        for start in range(0, len(self.prompts), self.batch):
            part = self.prompts[start : start + self.batch]
            generators = [torch.Generator().manual_seed(1000 * number + start + i) for i in range(len(part))]
            images += self.pipe(part, num_inference_steps=self.steps, generator=generators, **self.call).images
            report = self.pipe.plugins.report()
            assert set(report.denoiser_calls.values()) == {self.steps if knobs["reward"] is None else self.nfe}
            records.append(report.plugins["rbf_search"].records)
            console.print(f"{time.strftime('%H:%M:%S')} {knobs} {number} {start + len(part)}/{len(self.prompts)}", highlight=False)
        return images, records

    def best_of(self, knobs: dict[str, Any], n: int) -> tuple[list[Image.Image], np.ndarray]:
        """The best of n pictures of each prompt, and the running best reward [n, prompts]."""
        pictures, rewards = [], []
        for number in range(n):
            images, _ = self.make(knobs, number)
            pictures.append(images)
            rewards.append(self.judge.likelihood(images, self.prompts))
        best = np.argmax(rewards, axis=0)
        return [pictures[k][i] for i, k in enumerate(best)], np.maximum.accumulate(rewards, axis=0)

    def search(self, knobs: dict[str, Any]) -> tuple[list[Image.Image], np.ndarray]:
        """The picture that the search finds for each prompt, and what it would have given after each evaluation [nfe, prompts]."""
        images, records = self.make({**knobs, "reward": "emoji_judge", "max_nfe": self.nfe, "record": True}, 0)
        return images, np.concatenate([record["result"].numpy() for record in records], axis=1)


def kept(folder: Path, name: str, make: Any) -> tuple[list[Image.Image], np.ndarray, float]:
    """An arm's pictures, curve and seconds; made unless they are in ``folder``."""
    path = folder / f"{name.replace(' ', '_')}.npz"
    if not path.exists():
        began = time.perf_counter()
        images, curve = make()
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, images=np.stack([np.asarray(i) for i in images]), curve=curve, seconds=time.perf_counter() - began)
    found = np.load(path)
    return [Image.fromarray(each) for each in found["images"]], found["curve"], float(found["seconds"])


def draw(curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, path: Path) -> None:
    """Mean reward against evaluations, with the standard error of the mean over prompts."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    for name, (x, curve) in curves.items():
        mean, error = curve.mean(axis=1), curve.std(axis=1, ddof=1) / math.sqrt(curve.shape[1])
        axis.plot(x, mean, "o-" if len(x) < 30 else "-", label=name, markersize=4)
        axis.fill_between(x, mean - error, mean + error, alpha=0.15, linewidth=0)
    axis.set(xlabel="function evaluations a picture", ylabel="reward: the judge's mean log-likelihood", title=title)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(
    pipeline: str = "emoji-flux",
    prompts: Annotated[int, typer.Option(help="held-out prompts")] = 72,
    pairs: Annotated[bool, typer.Option(help="prompts for two objects, which are hard, or for one")] = True,
    steps: int = 10,
    nfe: Annotated[int, typer.Option(help="function evaluations a picture, in every arm")] = 60,
    particles: Annotated[int, typer.Option(help="this and the next four were chosen on other prompts")] = 12,
    norm: Annotated[float, typer.Option(help="of the VP search")] = 5.0,
    grid: str = "uniform",
    linear_norm: float = 3.5,
    linear_grid: str = "pipeline",
    batch: int = 24,
    threads: int = 1,
    settings: Annotated[bool, typer.Option("--settings", help="instead: other settings on other prompts")] = False,
    out: Path = Path("out/rbf"),
) -> None:
    """All arms, their table and their pictures."""
    torch.set_num_threads(threads)
    diffusers.utils.logging.disable_progress_bar()
    first, last = (prompts, prompts + OTHERS) if settings else (0, prompts)
    pair_captions, captions = map(scenes.pair_caption, held_out_pairs(last)), map(scenes.caption, held_out_labels()[:last])
    bench = Bench(pipeline, list(pair_captions if pairs else captions)[first:], steps, nfe, batch)
    if settings:
        return choose(bench, out)
    linear, vp = ({"interpolant": name, "grid": "pipeline", **ODE} for name in ("linear", "vp"))
    arms = {
        "one picture, ODE": lambda: bench.best_of(linear, 1),
        "best of N, ODE": lambda: bench.best_of(linear, nfe // steps),
        "best of N, VP ODE": lambda: bench.best_of(vp, nfe // steps),
        "RBF, linear SDE": lambda: bench.search(
            {"interpolant": "linear", "grid": linear_grid, "norm": linear_norm, "particles": particles}
        ),
        "RBF, VP SDE": lambda: bench.search({"interpolant": "vp", "grid": grid, "norm": norm, "particles": particles}),
    }
    told = f"{nfe} evaluations, {steps} steps; {particles} particles; VP {norm:g}, {grid}; linear {linear_norm:g}, {linear_grid}"
    what = "two objects" if pairs else "one object"
    table = Table(title=f"{pipeline}: {prompts} held-out prompts for {what}, {told}")
    for name in ("", "NFE", "reward", "linear RBF more (95 %)", "VP RBF more (95 %)", "all right", "gained", "lost", "seconds"):
        table.add_column(name, justify="right")
    made = {name: kept(out / "arms", name, make) for name, make in arms.items()}
    verdicts = {name: right(bench, images) for name, (images, _, _) in made.items()}
    plain, searches = verdicts["one picture, ODE"], ("RBF, linear SDE", "RBF, VP SDE")
    rows, curves = [], {}
    for name, (_, curve, seconds) in made.items():
        each = 1 if name.startswith("RBF") else steps
        ahead, found = {key: asdict(Mean.of(made[key][1][-1] - curve[-1])) for key in searches if key != name}, share(verdicts[name])
        assert found is not None
        gains = sum(b and not a for a, b in zip(plain, verdicts[name], strict=True))
        losses = sum(a and not b for a, b in zip(plain, verdicts[name], strict=True))
        row = {"arm": name, "nfe": each * len(curve), "reward": float(curve[-1].mean()), "ahead": ahead}
        rows.append({**row, "gains": gains, "losses": losses, "right": found.right, "low": found.low, "high": found.high, "s": seconds})
        more = [f"{d['mean']:+.3f} ({d['low']:+.3f} {d['high']:+.3f})" if (d := ahead.get(key)) else "" for key in searches]
        shares = f"{found.right}/{found.total} ({found.low:.0%}-{found.high:.0%})"
        table.add_row(name, str(row["nfe"]), f"{row['reward']:.3f}", *more, shares, str(gains), str(losses), f"{seconds:.0f}")
        if len(curve) > 1:
            curves[name] = (each * np.arange(1, len(curve) + 1), curve)
    console.print(table)
    about = {"torch": torch.__version__, "diffusers": diffusers.__version__, "python": platform.python_version(), "title": str(table.title)}
    (out / "results.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    draw(curves, f"{pipeline}, mean over {prompts} held-out prompts", out / "curve.png")
    shown = ("one picture, ODE", "best of N, ODE", "RBF, linear SDE", "RBF, VP SDE")
    labels = [([name, *([f"reward {made[name][1][-1].mean():.3f}"])], made[name][0][:8]) for name in shown]
    draw_grid(str(table.title), "reward and judge are one network", bench.prompts[:8], labels, 128).quantize(128).save(out / "grid.png")


def choose(bench: Bench, out: Path) -> None:
    """Reward and verdicts of every setting, one picture a prompt."""
    for steps, knobs in SETTINGS:
        bench.steps = steps
        name = f"{steps} steps, " + ", ".join(f"{key} {value}" for key, value in knobs.items())
        images, curve, seconds = kept(out / "settings", name, lambda knobs=knobs: bench.search(knobs))
        verdicts = right(bench, images)
        error = curve[-1].std(ddof=1) / math.sqrt(len(images))
        console.print(f"{name}: reward {curve[-1].mean():.2f} ({error:.2f}), {sum(verdicts)}/{len(verdicts)} right, {seconds:.0f} s")


def right(bench: Bench, images: list[Image.Image]) -> list[bool]:
    """Whether all that the prompt asks for is right, for each picture."""
    scores = bench.judge.score(images, bench.prompts)
    return [all(row[i] is not False for row in scores.values()) for i in range(len(images))]


if __name__ == "__main__":
    typer.run(main)
