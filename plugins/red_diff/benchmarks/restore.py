"""How near RED-diff comes to pictures that were measured, beside the pseudo-inverse alone and the prior alone.

    python plugins/red_diff/benchmarks/restore.py [--pictures 8] [--steps 100]        # emoji-pixel, five problems: about two minutes

The truth are pictures that the model itself draws from other noise, so the prior is the right one by construction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.methods.problems import Problem, read_operator, simulated
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

PROBLEMS = (
    "mask(0.5) + noise(0.02)",
    "downsample(4) + noise(0.02)",
    "blur(1.5) + noise(0.02)",
    "radon(8) + noise(0.005)",
    "phase(2) + noise(0.01)",
)


def drawn(pipe: Any, pictures: int, steps: int, seed: int) -> Tensor:
    """[n, 3, h, w] in [-1, 1]."""
    made = pipe(batch_size=pictures, num_inference_steps=steps, generator=torch.Generator().manual_seed(seed), output_type="np").images
    return torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2).float() * 2 - 1


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """dB of each picture, of a range of 2."""
    return -10 * torch.log10((x.clamp(-1, 1) - truth).square().flatten(1).mean(1) / 4)


def told(values: Tensor) -> str:
    return f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})"


def guess(problem: Problem) -> Tensor:
    """What there is without a model."""
    return problem.operator.pinv(problem.y) if problem.operator.linear else torch.zeros(problem.shape)


def main(
    pictures: Annotated[int, typer.Option(min=1)] = 8,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    weight: Annotated[float, typer.Option(min=0)] = 0.25,
    out: Annotated[Path, typer.Option()] = Path("out/red_diff"),
) -> None:
    pipe = load_pipeline("emoji-pixel")
    pipe.set_progress_bar_config(disable=True)
    truth = drawn(pipe, pictures, 200, seed=1)
    table = Table("problem", "pseudo-inverse, dB", "prior off, dB", "RED-diff, dB", "residual", "noise")
    rows, strips = [], []
    for text in PROBLEMS:
        operator, noise = read_operator(text)
        problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
        found, residual = [], float("nan")
        for strength in (0.0, weight):
            load_pipeline(pipe, plugins={"red_diff": {"problem": problem, "weight": strength}})
            found.append(drawn(pipe, pictures, steps, seed=3))
            residual = float(pipe.plugins.report().plugins["red_diff"].records["residual"].mean())
            pipe.plugins.remove("red_diff")
        scores = [told(psnr(x, truth)) for x in (guess(problem), *found)]
        table.add_row(text, *scores, f"{residual:.4f}", f"{noise}")
        rows.append({"problem": text, "psnr": scores, "residual": residual, "noise": noise})
        shown = (truth[:2], guess(problem)[:2].clamp(-1, 1), found[1][:2])
        strips.append(torch.cat([part[i] for i in range(min(2, pictures)) for part in shown], -1))
    out.mkdir(parents=True, exist_ok=True)
    sheet = ((torch.cat(strips, -2) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(sheet).resize((sheet.shape[1] * 4, sheet.shape[0] * 4), Image.Resampling.NEAREST).save(out / "restore.png")
    (out / "restore.json").write_text(json.dumps(rows, indent=1))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
