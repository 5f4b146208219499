"""Two captions of one object each, put together by SuperDiff, judged by emoji-sd's judge.

    python plugins/superdiff/benchmarks/captions.py --pairs 32 --steps 200 --out captions.png

Caption a: "a small cat face on the left on a blue background", b: "a small star on the right on a blue background", for pairs of
objects that no training picture shows together. Every arm draws the same pairs from the same seeds. "both": each object where its
caption wants it and the background right; "a", "b": the picture is as one caption says. emoji-sd was trained on pairs too, so the joint
caption in one prompt is what the model can do at best.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.judging import all_right
from diffgraft.lab.metrics import share
from diffgraft.lab.pictures import draw_grid
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train.evaluate import held_out_pairs
from PIL import Image
from rich.console import Console
from rich.table import Table

BATCH = 16
console = Console(width=140)


def draw(pipe, prompts: list[str], seconds: list[str] | None, knobs: dict[str, object], steps: int, guidance: float) -> list[Image.Image]:
    """One picture for each pair, prompt i from seed i."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        if seconds is not None:
            load_pipeline(pipe, plugins={"superdiff": {**knobs, "prompt": tuple(seconds[part])}})
        try:
            generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))[part]]
            images += pipe(prompts[part], num_inference_steps=steps, guidance_scale=guidance, generator=generators).images
        finally:
            if seconds is not None:
                pipe.plugins.clear()
    return images


def main(
    pairs: Annotated[int, typer.Option(help="Held-out pairs of objects.")] = 32,
    steps: Annotated[int, typer.Option(help="Steps of SuperDiff's SDE.")] = 200,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Picture grid, a row an arm, a column a pair.")] = Path("captions.png"),
) -> None:
    """Judge every arm and draw the grid."""
    pipe, judge = load_pipeline("emoji-sd"), load_bundled()
    pipe.set_progress_bar_config(disable=True)
    drawn = held_out_pairs(pairs)
    joint = [scenes.pair_caption(each) for each in drawn]
    one, two = ([scenes.caption(replace(each[i], size="small")) for each in map(scenes.parse_prompt, joint)] for i in (0, 1))
    arms = {
        "joint caption, 50 DDIM steps": draw(pipe, joint, None, {}, 50, guidance),
        "caption a, 50 DDIM steps": draw(pipe, one, None, {}, 50, guidance),
        **{name: draw(pipe, one, two, {"operation": name}, steps, guidance) for name in ("average", "or", "and")},
    }
    table = Table("arm", "both", "a", "b", "a or b", title=f"{pairs} pairs, {steps} SDE steps, guidance {guidance}")
    for name, images in arms.items():
        both, a, b = (all_right(judge.score(images, prompts)) for prompts in (joint, one, two))
        either = [x or y for x, y in zip(a, b, strict=True)]
        table.add_row(name, *(str(share(row)) for row in (both, a, b, either)))
    console.print(table)
    rows = [(name.split(", "), images[:8]) for name, images in arms.items()]
    footer = f"captions a and b ask for one object each; average, or, and: {steps} SDE steps; guidance {guidance:g}, same seeds"
    draw_grid("Two captions put together by SuperDiff", footer, joint[:8], rows, side=128).save(out)


if __name__ == "__main__":
    typer.run(main)
