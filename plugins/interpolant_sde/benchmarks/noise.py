"""What noise along the way does to the pictures of a bundled pipeline: judge score and diversity against eta and the number of steps.

    python plugins/interpolant_sde/benchmarks/noise.py --pipeline emoji-flux --prompts 48 --out emoji-flux.png

Every arm draws the same prompts from the same seeds. eta = 0 is the pipeline's own ODE. RMS: of pixels (0..255), to the ODE's picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from diffgraft import load_pipeline
from diffgraft.installed import registry
from diffgraft.lab.judging import all_right, load_judge
from diffgraft.lab.metrics import share
from diffgraft.lab.pictures import draw_grid
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from PIL import Image
from rich.console import Console
from rich.table import Table

BATCH = 16
SHOWN = 4
ARMS = [("flow_grpo", 0.0), ("flow_grpo", 0.3), ("flow_grpo", 0.7), ("flow_grpo", 1.0), ("const", 0.7), ("sigma", 0.7)]
console = Console(width=140)


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled pipeline of pictures.")] = "emoji-flux",
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 48,
    steps: Annotated[str, typer.Option(help="Numbers of steps, by comma.")] = "10,25,50",
    out: Annotated[Path, typer.Option(help="Picture grid, a row an arm, for every number of steps.")] = Path("noise.png"),
) -> None:
    """Judge every arm and draw the grid."""
    bundled = registry.bundled()[pipeline]
    pipe, judge = load_pipeline(pipeline), load_judge(bundled)
    assert judge is not None
    pipe.set_progress_bar_config(disable=True)
    texts = [scenes.caption(each) for each in held_out_labels()[:prompts]]
    counts = [int(each) for each in steps.split(",")]
    table = Table("noise", "eta", *(f"{n} steps: all right, RMS to ODE" for n in counts), title=f"{pipeline}, {prompts} prompts")
    ode: dict[int, list[Image.Image]] = {}
    rows: list[tuple[list[str], list[Image.Image]]] = []
    for noise, eta in ARMS:
        cells: list[str] = []
        shown: list[Image.Image] = []
        for n in counts:
            load_pipeline(pipe, plugins={"interpolant_sde": {"noise": noise, "eta": eta}})
            images: list[Image.Image] = []
            for start in range(0, prompts, BATCH):
                samples = [Sample(i, text) for i, text in enumerate(texts)][start : start + BATCH]
                settings = CallSettings(steps=n, guidance_scale=bundled.guidance_scale, extra=bundled.call)
                images += pipe(**{**call_arguments(pipe, samples, settings), "output_type": "pil"}).images
            pipe.plugins.clear()
            ode.setdefault(n, images)
            scores = judge.score(images, texts)
            found = share(all_right(scores))
            assert found is not None
            rms = np.mean([np.sqrt(np.mean((np.float32(a) - np.float32(b)) ** 2)) for a, b in zip(images, ode[n], strict=True)])
            cells.append(f"{found}, {rms:.0f}")
            shown += images[:SHOWN]
        rows.append(([noise, f"eta {eta:g}"] if eta else ["ODE"], shown))
        table.add_row(noise if eta else "none", f"{eta:g}", *cells)
    console.print(table)
    captions = [f"{n} steps: {text}" for n in counts for text in texts[:SHOWN]]
    draw_grid(f"Noise along the way: {pipeline}", "same prompts and seeds in every row", captions, rows, side=128).save(out)


if __name__ == "__main__":
    typer.run(main)
