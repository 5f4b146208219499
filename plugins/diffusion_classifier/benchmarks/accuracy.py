"""How often a diffusion classifier picks the right one of four captions that differ in one word: object, colour or place.

    python plugins/diffusion_classifier/benchmarks/accuracy.py --out out/classifier     # every part is kept there; a second call goes on

True renders of held-out scenes, and pictures that each model made itself of held-out prompts; chance and the bundled judge beside it (the
same four captions). For generated pictures "right" is the prompt that they were made of: of all, and of those that show it (by the
judge). Controls: every caption with noises of its own, which the method forbids. Also: the accuracy of each time alone, weights fitted on
the one half of the renders and tried on the other, and how well the score, used as a reward, tells good pictures from bad ones.
Writes results.json and times.png.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import diffusers
import matplotlib as mpl
import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.metrics import Mean
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import bundled_once
from diffgraft_checkpoints.train.evaluate import generate, held_out_labels, renders
from diffgraft_diffusion_classifier.method import accuracy, fit_weights, weighted, weighting
from diffgraft_diffusion_classifier.scoring import where
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

mpl.use("agg")
QUESTIONS: dict[str, tuple[str, list[str]]] = {
    "object": ("object", list(scenes.OBJECTS)),
    "colour": ("background", list(scenes.BACKGROUNDS)),
    "place": ("place", list(scenes.PLACES)),
}
"""What is asked -> (the label, its values)."""
OTHERS = 3
"""Wrong captions of each question."""
CHUNK = 20
console = Console(width=150)


def captions(number: int, labels: scenes.Labels) -> list[str]:
    """The true caption, three wrong ones for each question, and no caption."""
    rng = np.random.default_rng([77, number])
    texts = [scenes.caption(labels)]
    for field, values in QUESTIONS.values():
        wrong = [value for value in values if value != getattr(labels, field)]
        texts += [scenes.caption(replace(labels, **{field: str(value)})) for value in rng.choice(wrong, OTHERS, replace=False)]
    return [*texts, ""]


def of_question(values: Tensor, question: str) -> Tensor:
    """The four captions [pictures, 4, ...] of a question; the true one is the first."""
    begin = 1 + OTHERS * list(QUESTIONS).index(question)
    return torch.cat([values[:, :1], values[:, begin : begin + OTHERS]], 1)


def rights(errors: Tensor, weights: Tensor) -> list[float]:
    """Of each picture whether the first caption has the least error, alone."""
    return [accuracy(each[None], torch.tensor([0]), weights) for each in errors]


class Bench:
    """One pipeline and its classifier."""

    def __init__(self, name: str, timesteps: int, steps: int, batch: int, out: Path) -> None:
        self.name, self.steps, self.out = name, steps, out
        self.pipe = load_pipeline(name, plugins={"diffusion_classifier": {"timesteps": timesteps, "batch": batch}})
        self.pipe.set_progress_bar_config(disable=True)
        self.classifier = self.pipe.plugins["diffusion_classifier"]

    def pictures(self, source: str, labels: list[scenes.Labels]) -> list[Image.Image]:
        """Renders, or what the model makes of the captions in a few steps."""
        path = self.out / f"{self.name}-{source}-{len(labels)}.npy"
        if not path.exists():
            if source == "renders":
                made = renders(labels, 4_321)
            else:
                texts = [scenes.caption(each) for each in labels]
                drawn = self.pipe if self.name == "emoji-sd" else Guided(self.pipe)
                made = generate(drawn, texts, range(len(texts)), 2.0, self.steps)
            np.save(path, np.stack([np.asarray(image) for image in made]))
        return [Image.fromarray(each) for each in np.load(path)]

    def errors(self, source: str, images: list[Image.Image], labels: list[scenes.Labels], own_noises: bool = False) -> tuple[Tensor, int]:
        """(err_t [pictures, captions, T], forwards)."""
        parts, forwards = [], 0
        for begin in range(0, len(images), CHUNK):
            path = self.out / f"{self.name}-{source}{'-own-noises' if own_noises else ''}-{len(images)}-{begin}.pt"
            if not path.exists():
                began = time.perf_counter()
                chosen = images[begin : begin + CHUNK]
                texts = [captions(begin + i, each) for i, each in enumerate(labels[begin : begin + CHUNK])]
                found: Any = self.with_own_noises(chosen, texts) if own_noises else self.classifier.errors(self.pipe, chosen, texts)
                torch.save({"values": found.values, "forwards": found.forwards, "seconds": time.perf_counter() - began}, path)
                console.print(f"{time.strftime('%H:%M:%S')} {path.stem}", highlight=False)
            kept = torch.load(path)
            parts.append(kept["values"])
            forwards += kept["forwards"]
        return torch.cat(parts), forwards

    def with_own_noises(self, images: list[Image.Image], texts: list[list[str]]) -> Any:
        """The same with other noises for each caption."""
        found = []
        for number in range(len(texts[0])):
            self.pipe.plugins.configure("diffusion_classifier", seed=1 + number)
            found.append(self.pipe.plugins["diffusion_classifier"].errors(self.pipe, images, [[each[number]] for each in texts]))
        self.pipe.plugins.configure("diffusion_classifier", seed=0)
        return found[0]._replace(values=torch.cat([each.values for each in found], 1), forwards=sum(each.forwards for each in found))


class Guided:
    """emoji-flux, called as Stable Diffusion is."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def set_progress_bar_config(self, **config: Any) -> None:
        self.pipe.set_progress_bar_config(**config)

    def __call__(self, prompt: list[str], *, guidance_scale: float, **kwargs: Any) -> Any:
        return self.pipe(prompt, negative_prompt=[""] * len(prompt), true_cfg_scale=guidance_scale, **kwargs)


def judged(images: list[Image.Image], labels: list[scenes.Labels]) -> Tensor:
    """Minus the judge's log-likelihood of each caption [pictures, captions, 1]."""
    texts = [captions(i, each)[:-1] for i, each in enumerate(labels)]
    rows = [bundled_once().likelihood([image] * len(each), each) for image, each in zip(images, texts, strict=True)]
    return -torch.tensor(rows)[..., None]


def told_apart(scores: np.ndarray, good: np.ndarray) -> dict[str, float] | None:
    """The share of (good, bad) pairs of pictures of which the good one has the larger score, with a bootstrap interval over pictures."""

    def area(chosen: np.ndarray) -> float:
        a, b = scores[chosen][good[chosen]], scores[chosen][~good[chosen]]
        return float((a[:, None] > b).mean() + (a[:, None] == b).mean() / 2) if len(a) and len(b) else np.nan

    if good.all() or not good.any():
        return None
    rng = np.random.default_rng(0)
    draws = [area(rng.integers(len(good), size=len(good))) for _ in range(2000)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return {"area": area(np.arange(len(good))), "low": float(low), "high": float(high), "good": int(good.sum()), "bad": int((~good).sum())}


def main(
    sd: Annotated[int, typer.Option(help="renders, and as many generated pictures, for emoji-sd")] = 200,
    flux: Annotated[int, typer.Option(help="renders for emoji-flux")] = 60,
    flux_generated: Annotated[int, typer.Option(help="generated pictures for emoji-flux")] = 20,
    own_noises: Annotated[int, typer.Option(help="renders of the control with a noise for each caption")] = 40,
    timesteps: int = 5,
    steps: Annotated[int, typer.Option(help="of the generated pictures")] = 10,
    batch: int = 55,
    threads: int = 1,
    out: Path = Path("out/classifier"),
) -> None:
    """All parts, their tables and the picture."""
    torch.set_num_threads(threads)
    diffusers.utils.logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"settings": {"timesteps": timesteps, "steps": steps, "torch": torch.__version__, "on": platform.machine()}}
    curves: dict[str, Any] = {}
    table = Table("model", "pictures", "of", *QUESTIONS, "forwards a picture")
    fits = Table("emoji-sd, second half of the renders", *QUESTIONS)
    for name, counts in (("emoji-sd", (sd, sd)), ("emoji-flux", (flux, flux_generated))):
        bench = Bench(name, timesteps, steps, batch, out)
        for source, count in zip(("renders", "generated"), counts, strict=True):
            labels = held_out_labels()[:count]
            images = bench.pictures(source, labels)
            errors, forwards = bench.errors(source, images, labels)
            ones, judge = torch.ones(errors.shape[-1]), judged(images, labels)
            verdicts = bundled_once().score(images, [scenes.caption(each) for each in labels])
            rows = {"classifier": (errors, ones), "judge": (judge, torch.ones(1))}
            for who, (values, weights) in rows.items():
                found = {question: rights(of_question(values, question), weights) for question in QUESTIONS}
                results[f"{name} {source} {who}"] = {question: asdict(Mean.of(each)) for question, each in found.items()}
                cost = f"{forwards} calls, {errors[0].numel()} rows" if who == "classifier" else ""
                table.add_row(name, f"{source}, {who}", str(len(images)), *(text(each) for each in found.values()), cost)
                if source == "generated":
                    shown = {q: [r for r, ok in zip(found[q], verdicts[QUESTIONS[q][0]], strict=True) if ok] for q in QUESTIONS}
                    table.add_row(name, f"{source}, {who}", "that show it", *(text(each) for each in shown.values()), "")
                    results[f"{name} {source} {who}, that show it"] = {q: asdict(Mean.of(each)) for q, each in shown.items()}
            if source == "generated":
                good = np.array([all(each) for each in zip(*verdicts.values(), strict=True)])
                err = weighted(errors, ones)
                for what, scores in {"err(no prompt) - err(prompt)": err[:, -1] - err[:, 0], "-err(prompt)": -err[:, 0]}.items():
                    results[f"{name} {source}, {what} tells what shows the prompt"] = told_apart(scores.numpy(), good)
            times = bench.classifier.errors(bench.pipe, [], [""]).times
            for question in QUESTIONS:
                each = of_question(errors, question)
                alone = [Mean.of(rights(each, torch.eye(len(times))[k])) for k in range(len(times))]
                curves[f"{name}, {source}, {question}"] = {"times": times, "alone": [asdict(mean) for mean in alone]}
            if name == "emoji-sd" and source == "renders":
                weigh(errors, bench, fits, results)
                if own_noises:
                    own, _ = bench.errors(source, images[:own_noises], labels[:own_noises], own_noises=True)
                    for what, values in ((f"first {own_noises}, same noises", errors[:own_noises]), ("noises of its own for each", own)):
                        found = {question: rights(of_question(values, question), ones) for question in QUESTIONS}
                        results[f"{name} {source} {what}"] = {question: asdict(Mean.of(each)) for question, each in found.items()}
                        table.add_row(name, f"{source}, {what}", str(own_noises), *(text(each) for each in found.values()), "")
    results["alone"] = curves
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(curves, out / "times.png")
    console.print(table, fits)
    for key, value in results.items():
        if "tells what shows" in key:
            console.print(key, value, highlight=False)


def text(values: list[float]) -> str:
    """A share with its interval."""
    mean = Mean.of(values)
    return f"{100 * mean.mean:.0f} % ({100 * mean.low:.0f}-{100 * mean.high:.0f})"


def weigh(errors: Tensor, bench: Bench, table: Table, results: dict[str, Any]) -> None:
    """Weights of times: given ones, and such as were fitted on the first half for all questions at once."""
    half, kind = len(errors) // 2, bench.pipe.scheduler.config.prediction_type
    known = torch.cat([of_question(errors[:half], question) for question in QUESTIONS])
    labels = torch.zeros(len(known), dtype=torch.long)
    levels, ones = where(bench.classifier.config, bench.pipe.plugins.family, bench.pipe.scheduler)
    weights = {
        "uniform": ones,
        "epsilon": weighting("epsilon", levels, kind),
        "fitted": torch.tensor(fit_weights(known, labels, steps=300)),
        "fitted, polynomial of degree 2": torch.tensor(fit_weights(known, labels, degree=2, steps=300)),
    }
    for name, used in weights.items():
        found = {question: rights(of_question(errors[half:], question), used) for question in QUESTIONS}
        means = {question: asdict(Mean.of(each)) for question, each in found.items()}
        results[f"emoji-sd renders, second half, weights {name}"] = {"weights": used.tolist(), **means}
        table.add_row(name, *(text(each) for each in found.values()))


def draw(curves: dict[str, Any], path: Path) -> None:
    """Accuracy of each time alone."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), sharey=True, constrained_layout=True)
    for axis, key in zip(axes, dict.fromkeys(key.rsplit(", ", 1)[0] for key in curves), strict=True):
        for question in QUESTIONS:
            curve = curves[f"{key}, {question}"]
            mean, low, high = (100 * np.array([each[what] for each in curve["alone"]]) for what in ("mean", "low", "high"))
            axis.plot(curve["times"], mean, "o-", label=question, markersize=4)
            axis.fill_between(curve["times"], low, high, alpha=0.15, linewidth=0)
        axis.axhline(100 / (1 + OTHERS), color="gray", linestyle=":")
        axis.set(title=key, xlabel="time (0: clean)", ylim=(0, 103))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("right one of four captions, %")
    axes[0].legend(loc="lower center")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    typer.run(main)
