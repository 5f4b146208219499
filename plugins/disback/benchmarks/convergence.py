"""Does the way along the teacher's path get there sooner? One-step students of a bundled pipeline, with and without it.

    python plugins/disback/benchmarks/convergence.py                      # one seed, 40 steps: 3 minutes of a core
    python plugins/disback/benchmarks/convergence.py --seeds 0,1,2 --steps 112 --out convergence

Arms, from the same seed, prompts, rates and batches, all of the same number of optimizer steps, the first stage's included:

    dmd      path = 0: plain distribution matching
    disback  path = 4: the fake is first trained on the beginning student's samples for --record steps; then the target goes back
    warm     path = 1: the same first stage, but the target is the teacher from its end on: what the fake's start alone brings

Before some of the steps the student draws held-out captions, from the same noise in all arms: Frechet distance of the judge's features to
true pictures (one object), and how many pictures the judge finds right (all of it; the object; pairs of objects). Finished runs are kept
in --out; OUT.png shows them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline, unload
from diffgraft.methods.examples import Example
from diffgraft.methods.fitness import frechet
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from diffgraft.methods.predictions import SignalNoise, clean_estimate
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.evaluate import held_out_labels, held_out_pairs, renders
from diffgraft_disback import DisBack
from diffgraft_disback.fitting import DisBackFitter

ARMS = {"dmd": 0, "disback": 4, "warm": 1}
PART = 32


class Sight:
    """What a student draws, held against what was asked for."""

    def __init__(self, pipe: Any, one: int, pairs: int) -> None:
        self.pipe, self.one = pipe, one
        labels = held_out_labels()
        self.captions = [scenes.caption(each) for each in labels[:one]] + [scenes.pair_caption(each) for each in held_out_pairs(pairs)]
        self.judge = load_bundled()
        self.truth = self.judge.features(renders(labels, 1) + renders(labels, 2))
        words = pipe.tokenizer(
            self.captions, padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            self.text = pipe.text_encoder(words.input_ids)[0]
        config = pipe.unet.config
        size = (len(self.captions), config.in_channels, config.sample_size, config.sample_size)
        self.noise = torch.randn(size, generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def pictures(self, unet: Any, t: int, kind: str) -> list[Any]:
        abar = self.pipe.scheduler.alphas_cumprod[t]
        levels = SignalNoise(abar.sqrt(), (1 - abar).sqrt())
        made = []
        for z, text in zip(self.noise.split(PART), self.text.split(PART), strict=True):
            x0 = clean_estimate(z, unet(z, torch.tensor(t), text).sample, levels, kind)
            made += self.pipe.image_processor.postprocess(self.pipe.vae.decode(x0 / self.pipe.vae.config.scaling_factor).sample)
        return made

    def of(self, pictures: list[Any]) -> dict[str, float]:
        scores = self.judge.score(pictures, self.captions)
        right = np.array([all(row[i] is not False for row in scores.values()) for i in range(len(pictures))])
        objects = np.array([each is True for each in scores["object"]])
        return {
            "frechet": frechet(self.judge.features(pictures[: self.one]), self.truth),
            "right": float(right[: self.one].mean()),
            "object": float(objects[: self.one].mean()),
            "pairs": float(right[self.one :].mean()),
        }


def watched(sight: Sight, at: list[int], row: list[dict[str, float]], sheet: list[Any]) -> type[DisBackFitter]:
    """A fitter that looks at its student before some of its steps."""

    class Watched(DisBackFitter):
        def loss(self, session: Any, batch: Any) -> Any:
            if batch.step in at:
                with self.showing("fit"):
                    pictures = sight.pictures(self.trained, self.timestep, self.kind)
                students = sum(self.path.moves(step, self.config.student_every) for step in range(batch.step))
                row.append({"step": batch.step, "students": students, **sight.of(pictures)})
                sheet.append([*pictures[:6], *pictures[sight.one : sight.one + 2]])
                print(json.dumps(row[-1]), flush=True)
            return super().loss(session, batch)

    return Watched


def prompts(count: int = 2000, seed: int = 5) -> list[Example]:
    """Captions that the pipeline was trained on, of one object and of two."""
    trained, rng = scenes.split()[0], np.random.default_rng(seed)
    one = [scenes.caption(trained[i]) for i in rng.choice(len(trained), count // 2, replace=False)]
    return [Example(text) for text in one + [scenes.pair_caption(scenes.draw_pair(rng, False)) for _ in range(count - len(one))]]


def main(
    out: Annotated[Path, typer.Option(help="Folder of finished runs.")] = Path("convergence"),
    pipeline: str = "emoji-sd-small",
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    arms: Annotated[str, typer.Option(help="Of dmd, disback, warm.")] = "dmd,disback",
    steps: Annotated[int, typer.Option(help="Of the optimizer, the first stage's included.")] = 40,
    record: Annotated[int, typer.Option(help="Of the first stage.")] = 24,
    stay: Annotated[int, typer.Option(help="For each target on the way back.")] = 8,
    rate: float = 1e-3,
    batch: int = 8,
    one: Annotated[int, typer.Option(help="Held-out captions of one object.")] = 96,
    pairs: Annotated[int, typer.Option(help="And of two.")] = 64,
    looks: Annotated[str, typer.Option(help="Steps before which it looks, comma-separated; else every 8th, later 16th.")] = "",
) -> None:
    """Train, look, and write one JSON a run; then the table."""
    out.mkdir(parents=True, exist_ok=True)
    pipe = unload(load_pipeline(pipeline))
    pipe.set_progress_bar_config(disable=True)
    sight, examples = Sight(pipe, one, pairs), prompts()
    at = sorted({step for step in (*range(0, 73, 8), *range(72, steps, 16), steps) if step <= steps})
    if looks:
        at = sorted(set(map(int, looks.split(","))))
    for seed in map(int, seeds.split(",")):
        for arm in arms.split(","):
            path = out / f"{arm}-{seed}.json"
            if path.exists():
                continue
            row: list[dict[str, float]] = []
            sheet: list[Any] = []
            plugin = type("Watching", (DisBack,), {"fitting": watched(sight, at, row, sheet)})()
            knobs = {"path": ARMS[arm], "record": record, "stay": stay, "rate": rate, "fake_rate": rate, "student_every": 2}
            settings, began = CallSettings(steps=50, guidance_scale=2.0), time.process_time()
            plan = FitPlan(steps + 1, batch, seed, keep_every=1e9)
            fit(pipe, plugin, examples, settings, out / f"{arm}-{seed}.safetensors", plan, knobs=knobs)
            about = {"pipeline": pipeline, "batch": batch, "seconds": round(time.process_time() - began), **knobs}
            path.write_text(json.dumps({**about, "curve": row}, indent=1))
            draw(out / f"{arm}-{seed}.png", sheet)
    print(table(out))
    curves(out)


def curves(out: Path) -> None:
    """OUT.png: the Frechet distance over steps of the optimizer and of the student, seen in all seeds; bands are their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for arm, points in ARMS.items():
        if seen := looks_of(out, arm):
            values = np.array([[each["frechet"] for each in looks] for looks in seen])
            for axis, key in zip(axes, ("step", "students"), strict=True):
                x = [looks[0][key] for looks in seen]
                axis.plot(x, values.mean(1), "o-", markersize=3, label=f"N = {points} ({arm})")
                axis.fill_between(x, values.min(1), values.max(1), alpha=0.25)
    axes[0].set(xlabel="steps of the optimizer, first stage included", ylabel="Frechet distance")
    axes[1].set(xlabel="steps of the student")
    axes[0].legend()
    figure.savefig(out.with_suffix(".png"), dpi=100)


def looks_of(out: Path, arm: str) -> list[tuple[dict[str, float], ...]]:
    """What the seeds of an arm saw at the steps before which all of them were looked at, by step."""
    seen = [{look["step"]: look for look in json.loads(each.read_text())["curve"]} for each in sorted(out.glob(f"{arm}-*.json"))]
    return [tuple(each[step] for each in seen) for step in sorted(set.intersection(*map(set, seen)))] if seen else []


def draw(path: Path, sheet: list[Any]) -> None:
    """A row of pictures for each look."""
    from PIL import Image

    side = sheet[0][0].width
    page = Image.new("RGB", (side * len(sheet[0]), side * len(sheet)))
    for y, row in enumerate(sheet):
        for x, picture in enumerate(row):
            page.paste(picture, (x * side, y * side))
    page.save(path)


def table(out: Path) -> str:
    """Means over seeds by total steps, least and greatest in brackets."""
    lines = ["| arm | steps | of the student | Frechet | one object right | pairs right |", "|---|---|---|---|---|---|"]
    for arm in ARMS:
        for looks in looks_of(out, arm):
            cells = [
                f"{np.mean(v):.2f} ({min(v):.2f} to {max(v):.2f})"
                for key in ("frechet", "right", "pairs")
                if (v := [x[key] for x in looks])
            ]
            lines.append(f"| {arm} | {looks[0]['step']} | {looks[0]['students']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
