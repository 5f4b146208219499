"""Two captions of one object each, mixed by their option prices, beside what they are compared with, judged by emoji-sd's judge.

    python plugins/black_scholes/benchmarks/two_prompts.py --pairs 48 --out mixed.png

Caption a: "a small cat face on the left on a blue background", b: "a small star on the right on a blue background", for pairs of objects
that no training picture shows together. Every arm draws the same pairs from the same seeds with as many denoiser forwards, which the
report counts: SuperDiff asks for both prompts at every step and takes half as many steps. The scorer is the judge's log-probability of a
caption in the half of the picture that the caption names ("call, whole picture": in all of it); the same judge decides in the end.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.judging import all_right
from diffgraft.lab.metrics import Mean, share
from diffgraft.lab.pictures import draw_grid
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import bundled_once, isolate
from diffgraft_checkpoints.train.evaluate import held_out_pairs
from PIL import Image
from rich.console import Console
from rich.table import Table

BATCH = 24
console = Console(width=150)


def in_its_half(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The judge's mean log-probability of a caption of one object, with the other half of the picture painted over."""
    halves = [isolate(image, scenes.parse_prompt(prompt)[0].place) for image, prompt in zip(images, prompts, strict=True)]
    return bundled_once().likelihood(halves, prompts)


@dataclass
class Arm:
    """A way of drawing the pairs; ``knobs`` of ``plugin`` but its prompt, None: the plain pipeline with ``prompts``."""

    prompts: list[str]
    plugin: str | None = None
    knobs: dict[str, Any] | None = None
    steps: int = 50

    def draw(self, pipe: Any, seconds: list[str], guidance: float) -> tuple[list[Image.Image], int, str]:
        """A picture for each pair from its own seed; denoiser forwards a picture (rows of a batch); how often b's turn was, and changes."""
        images: list[Image.Image] = []
        rows, taken = 0, [torch.zeros(self.steps, 0, dtype=torch.bool)]
        for start in range(0, len(self.prompts), BATCH):
            part = slice(start, start + BATCH)
            name = self.plugin or "black_scholes"  # off it counts the plain pipeline's forwards
            knobs = {} if self.plugin is None else {**(self.knobs or {}), "prompt": tuple(seconds[part])}
            load_pipeline(pipe, plugins={name: knobs})
            try:
                generators = [torch.Generator().manual_seed(seed) for seed in range(len(self.prompts))[part]]
                images += pipe(self.prompts[part], num_inference_steps=self.steps, guidance_scale=guidance, generator=generators).images
                report = pipe.plugins.report()
                assert set(report.forwards) == {"both"}, report.forwards  # each of two rows a picture
                rows = 2 * report.forwards["both"]
                taken += [report.plugins[name].records["second"]] if "second" in report.plugins[name].records else []
            finally:
                pipe.plugins.clear()
        second = torch.cat(taken, dim=1).float()
        turns = f"{second.mean():.0%}, {second.diff(dim=0).abs().mean():.0%}" if second.numel() else ""
        return images, rows, turns


def main(
    pairs: Annotated[int, typer.Option(help="Held-out pairs of objects.")] = 48,
    steps: Annotated[int, typer.Option(help="Steps; SuperDiff takes half as many.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Picture grid, a row an arm, a column a pair.")] = Path("mixed.png"),
) -> None:
    """Draw and judge every arm."""
    pipe, judge = load_pipeline("emoji-sd"), bundled_once()
    pipe.set_progress_bar_config(disable=True)
    joint = [scenes.pair_caption(each) for each in held_out_pairs(pairs)]
    one, two = ([scenes.caption(replace(each[i], size="small")) for each in map(scenes.parse_prompt, joint)] for i in (0, 1))
    judged, whole_picture = ({"scorer": scorer, "spot": "percent"} for scorer in (in_its_half, "emoji_judge"))
    arms = {
        "joint caption": Arm(joint, steps=steps),
        "caption a": Arm(one, steps=steps),
        "average": Arm(one, "black_scholes", {"rule": "average"}, steps),
        "alternating": Arm(one, "black_scholes", {"rule": "alternating"}, steps),
        "call": Arm(one, "black_scholes", judged, steps),
        "call, whole picture": Arm(one, "black_scholes", whole_picture, steps),
        "official": Arm(one, "black_scholes", {**judged, "rule": "official"}, steps),
        "superdiff and": Arm(one, "superdiff", {"operation": "and"}, steps // 2),
    }
    columns = (
        "arm",
        "forwards",
        "with b, changes",
        "both objects",
        "all as asked",
        "weaker prompt",
        "more than alternating (95 %)",
        "seconds",
    )
    table = Table(*columns, title=f"emoji-sd, {pairs} held-out pairs, {steps} steps, guidance {guidance:g}")
    made, weaker, told = {}, {}, {}
    for name, arm in arms.items():
        began = time.perf_counter()
        made[name], rows, turns = arm.draw(pipe, two, guidance)
        seconds = time.perf_counter() - began
        scores = judge.score(made[name], joint)
        whole = all_right(scores)
        weaker[name] = np.minimum(in_its_half(made[name], one), in_its_half(made[name], two))
        told[name] = [str(rows), turns, str(share(list(map(bool, scores["object"])))), str(share(whole))]
        told[name] += [f"{weaker[name].mean():.3f}", f"{seconds:.0f}"]
        console.print(f"{time.strftime('%H:%M:%S')} {name}: {told[name]}", highlight=False)
    for name in arms:
        more = Mean.of(weaker[name] - weaker["alternating"])
        table.add_row(name, *told[name][:-1], f"{more.mean:+.3f} ({more.low:+.3f} to {more.high:+.3f})", told[name][-1])
    console.print(table)
    footer = (
        "weaker prompt: the judge's mean log-probability of the caption that is shown less, in its half; scorer and judge are one network"
    )
    rows_of = [([name, told[name][2].partition(" ")[0] + " both"], images[:8]) for name, images in made.items()]
    draw_grid(str(table.title), footer, joint[:8], rows_of, side=128).quantize(128).save(out)


if __name__ == "__main__":
    typer.run(main)
