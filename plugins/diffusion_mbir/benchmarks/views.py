"""Tomography of volumes with few views: DiffusionMBIR beside the same code slice by slice, RED-diff, total variation, pseudo-inverse.

    python plugins/diffusion_mbir/benchmarks/views.py                 # 2 volumes, 2 views: about a minute and a half of a core
    python plugins/diffusion_mbir/benchmarks/views.py --volumes 6 --views 2 --views 4 --views 8 --out out/mbir          # ten minutes

A volume is one object that grows along z (``volumes.py``); what is measured is grey (the mean of the colours), or each colour with
``--colours``. It needs Noto's emoji font, as the checkpoint's training does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab.metrics import ssim
from diffgraft.methods.measurements import Grey, Radon
from diffgraft.methods.problems import Problem, simulated
from diffgraft_diffusion_mbir.method import admm, largest
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor
from volumes import volume

NOISE = 0.005
SEED = 100
"""Of the volumes that are measured; the knobs were chosen on those of seed 7."""
TV = {"weight": 0.003, "rho": 0.1}
"""Of total variation in three directions without a model, chosen likewise."""
RED = {"weight": 0.25, "lr": 0.1}
LEFT = 130
"""Pixels for the names of the rows."""
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 12: 2.201}
"""Student's t for a 95 % interval of the mean of so many."""


def psnr(x: Tensor, truth: Tensor) -> float:
    """dB of a whole volume, of a range of 2."""
    return float(-10 * torch.log10((x.clamp(-1, 1) - truth).square().mean() / 4))


def likeness(x: Tensor, truth: Tensor) -> float:
    """SSIM, the mean over the slices."""
    told = [((each.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)[:, None].numpy() for each in (x, truth)]
    return float(np.mean(ssim(*told) or [math.nan]))


def sampled(plugin: str | None, pipe: Any, problem: Problem, steps: int, knobs: dict[str, Any]) -> Tensor:
    load_pipeline(pipe, plugins={plugin: {"problem": problem, **knobs}} if plugin else {})
    depth = len(problem.y)
    made = pipe(batch_size=depth, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np").images
    if plugin:
        pipe.plugins.remove(plugin)
    return torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2).float() * 2 - 1


def all_ways(x: Tensor) -> Tensor:
    """Differences along z, y and x [3, depth, c, h, w]; 0 behind the last."""
    found = torch.zeros(3, *x.shape)
    found[0, :-1], found[1, :, :, :-1], found[2, ..., :-1] = x[1:] - x[:-1], x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]
    return found


def all_ways_back(v: Tensor) -> Tensor:
    """The adjoint."""
    x = torch.zeros(v.shape[1:])
    x[1:] += v[0, :-1]
    x[:-1] -= v[0, :-1]
    x[:, :, 1:] += v[1, :, :, :-1]
    x[:, :, :-1] -= v[1, :, :, :-1]
    x[..., 1:] += v[2, ..., :-1]
    x[..., :-1] -= v[2, ..., :-1]
    return x


def total_variation(problem: Problem, weight: float, rho: float, iterations: int = 150) -> Tensor:
    """Without a model: ADMM on total variation in three directions, from black."""
    op = problem.operator
    size = largest(lambda v: op.AT(op.A(v)), (1, *problem.shape[1:]), torch.device("cpu"))
    x, ATy = torch.zeros(problem.shape), op.AT(problem.y)
    d, u = torch.zeros(3, *x.shape), torch.zeros(3, *x.shape)
    for _ in range(iterations):
        x, d, u = admm(x, d, u, lambda v: op.AT(op.A(v)), ATy, all_ways, all_ways_back, weight * size, rho * size, 3)
    return x


def methods(pipe: Any, steps: int, views: int) -> dict[str, Callable[[Problem], Tensor]]:
    return {
        "pseudo-inverse": lambda problem: problem.operator.pinv(problem.y),
        "TV in 3-D, no model": lambda problem: total_variation(problem, **TV),
        "RED-diff": lambda problem: sampled("red_diff", pipe, problem, steps, RED),
        "slice by slice": lambda problem: sampled("diffusion_mbir", pipe, problem, steps, {"weight": 0.0}),
        "DiffusionMBIR": lambda problem: sampled("diffusion_mbir", pipe, problem, steps, {}),
    }


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over the volumes, by Student's t."""
    if len(values) not in T95:
        return f"{np.mean(values):.2f}"
    return f"{np.mean(values):.2f} ± {T95[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def shown(x: Tensor, scale: int = 4) -> Image.Image:
    """The middle slice, and beside it the section along z through the middle row."""
    depth = len(x)
    section = x[:, :, x.shape[2] // 2].permute(1, 0, 2)
    strip = torch.ones(x.shape[1], x.shape[2], 2 * x.shape[3] + 2)
    strip[..., : x.shape[3]] = x[depth // 2]
    top = (x.shape[2] - min(depth, x.shape[2])) // 2
    strip[:, top : top + depth, x.shape[3] + 2 :] = section[:, : x.shape[2]]
    values = ((strip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(values if values.shape[2] == 3 else values[..., 0]).convert("RGB")
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def main(
    volumes: Annotated[int, typer.Option(min=1)] = 2,
    views: Annotated[list[int], typer.Option()] = [2],  # noqa: B006
    depth: Annotated[int, typer.Option(min=2)] = 16,
    steps: Annotated[int, typer.Option(min=1)] = 50,
    colours: Annotated[bool, typer.Option(help="Measure each colour.")] = False,
    seed: Annotated[int, typer.Option()] = SEED,
    out: Annotated[Path, typer.Option()] = Path("out/diffusion_mbir"),
) -> None:
    torch.set_num_threads(1)
    pipe = load_pipeline("emoji-pixel")
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    view = (lambda x: x) if colours else (lambda x: x.mean(1, keepdim=True))
    truths = [volume(seed, number, depth) for number in range(volumes)]
    table = Table("views", "method", "PSNR, dB", "3-D less this, dB", "SSIM", "seconds a volume")
    rows: list[dict[str, Any]] = []
    for n in views:
        operator = Radon(n) if colours else Radon(n) @ Grey()
        problems = [simulated(operator, truth, NOISE, torch.Generator().manual_seed(i)) for i, truth in enumerate(truths)]
        scores: dict[str, list[float]] = {}
        strips = [shown(view(truths[0]))]
        for name, method in methods(pipe, steps, n).items():
            began = time.perf_counter()
            found = [view(method(problem)) for problem in problems]
            seconds = (time.perf_counter() - began) / volumes
            scores[name] = [psnr(x, view(truth)) for x, truth in zip(found, truths, strict=True)]
            alike = [likeness(x, view(truth)) for x, truth in zip(found, truths, strict=True)]
            rows.append({"views": n, "method": name, "psnr": scores[name], "ssim": alike, "seconds": seconds})
            strips.append(shown(found[0]))
        for row in rows[-len(scores) :]:
            gain = [a - b for a, b in zip(scores["DiffusionMBIR"], row["psnr"], strict=True)]
            told = "" if row["method"] == "DiffusionMBIR" else interval(gain)
            table.add_row(str(n), row["method"], interval(row["psnr"]), told, interval(row["ssim"]), f"{row['seconds']:.1f}")
        sheet = Image.new("RGB", (strips[0].width + LEFT, sum(each.height + 4 for each in strips)), "white")
        for i, (name, each) in enumerate(zip(["truth", *scores], strips, strict=True)):
            ImageDraw.Draw(sheet).text((4, i * (each.height + 4) + each.height // 2 - 6), name, fill="black")
            sheet.paste(each, (LEFT, i * (each.height + 4)))
        sheet.save(out / f"views-{n}.png")
    (out / "views.json").write_text(json.dumps(rows, indent=1))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
