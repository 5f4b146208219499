"""How near FLAIR comes to rendered pictures that were measured, beside the pseudo-inverse and red_diff with as many denoiser calls.

    python plugins/flair/benchmarks/restore.py    # emoji-flux, 12 held-out pictures, three problems: some minutes
    python plugins/flair/benchmarks/restore.py --pictures 2 --steps 6    # a look: one minute
    python plugins/flair/benchmarks/restore.py --training --methods "flair,flair artefact=null,flair adjust=0"    # knobs, on other pictures

The truth are renders whose combination of object, background, size and place the model never saw; their captions are the prompts. FLAIR
has its default knobs, with w(t) calibrated on training pictures; those of red_diff are the best of a grid on four training pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import load_pipeline
from diffgraft.lab import metrics
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.problems import Problem, read_operator, simulated
from diffgraft_checkpoints.emoji import scenes
from diffgraft_flair import measured_on
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

PROBLEMS = ("downsample(4) + noise(0.02)", "mask(0.5) + noise(0.02)", "blur(1.5) + noise(0.02)")
GRID = [{"lr": lr, "weight": weight} for lr in (0.2, 0.4) for weight in (0.004, 0.02, 0.1)]
"""Knobs of red_diff that are tried."""


def drawn(first: int, pictures: int, held_out: bool) -> tuple[Tensor, list[str]]:
    """(pictures [n, 3, 64, 64] in [-1, 1], their captions)."""
    labels = scenes.split()[held_out]
    order = np.random.default_rng(23).permutation(len(labels))[first : first + pictures]
    made, captions = [], []
    for i in order:
        image = scenes.render(scenes.upright(scenes.sample_scene(labels[i], np.random.default_rng([23, int(i)]))))
        made.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1)
        captions.append(scenes.caption(labels[i]))
    return torch.stack(made), captions


def calibrated(pipe: Any, pictures: int, levels: int) -> Artefact:
    """The loss over t of training pictures that are shown nowhere else here."""

    def calls() -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for picture, caption in zip(*drawn(1000, pictures, held_out=False), strict=True):
            draws = torch.Generator().manual_seed(7 + len(caption))
            yield picture, {"prompt": caption, "num_inference_steps": levels, "generator": draws, "output_type": "latent"}

    return measured_on(pipe, calls())


def found(pipe: Any, plugin: str, knobs: dict[str, Any], prompts: list[str], steps: int) -> tuple[Tensor, float, int]:
    """(pictures, mean residual, denoiser forwards)."""
    load_pipeline(pipe, plugins={plugin: knobs})
    draws = [torch.Generator().manual_seed(100 + i) for i in range(len(prompts))]
    made = pipe(prompts, negative_prompt=[""] * len(prompts), num_inference_steps=steps, generator=draws, output_type="np").images
    report = pipe.plugins.report()
    pipe.plugins.remove(plugin)
    pictures = torch.from_numpy(np.asarray(made)).permute(0, 3, 1, 2).float() * 2 - 1
    return pictures, float(report.plugins[plugin].records["residual"].mean()), sum(report.forwards.values())


def scores(x: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """(PSNR in dB, SSIM) of each picture."""
    here, there = (((v.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1)[:, None].numpy() for v in (x, truth))
    return torch.tensor(metrics.psnr(here, there)), torch.tensor(metrics.ssim(here, there))


def told(values: Tensor, digits: int) -> str:
    """Mean and the half width of its 95 % interval (Student's t is left out: 1.96 standard errors)."""
    return f"{values.mean():.{digits}f} +- {1.96 * values.std() / math.sqrt(len(values)):.{digits}f}"


def best_of(pipe: Any, problem: Problem, truth: Tensor, prompts: list[str], steps: int) -> dict[str, Any]:
    """red_diff's knobs with the best PSNR."""

    def near(knobs: dict[str, Any]) -> float:
        return float(scores(found(pipe, "red_diff", {"problem": problem, **knobs}, prompts, steps)[0], truth)[0].mean())

    return max(GRID, key=near)


def read(text: str, artefact: Artefact) -> tuple[str, dict[str, Any]]:
    """(plugin, knobs) of "flair adjust=0 artefact=null"."""
    plugin, *knobs = text.split()
    said = {key: json.loads(value) for key, value in (knob.split("=", 1) for knob in knobs)}
    return plugin, {**({"artefact": artefact} if plugin == "flair" else {}), **said}


def main(
    pictures: Annotated[int, typer.Option(min=2)] = 12,
    steps: Annotated[int, typer.Option(min=1)] = 12,
    training: Annotated[bool, typer.Option("--training", help="on training pictures, where knobs are looked for")] = False,
    methods: Annotated[str, typer.Option(help="plugins with knobs, joined by commas")] = "red_diff,flair",
    out: Annotated[Path, typer.Option()] = Path("out/flair"),
) -> None:
    pipe = load_pipeline("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    truth, prompts = drawn(0, pictures, held_out=not training)
    others, other_prompts = drawn(500, 4, held_out=False)
    file = out / "emoji-flux.safetensors"
    artefact = Artefact.load(file, "flair") if file.exists() else calibrated(pipe, 6, 50)
    artefact.save(file)
    table = Table("problem", "method", "PSNR, dB", "SSIM", "residual", "forwards")
    rows: list[dict[str, Any]] = []
    strips: list[list[Tensor]] = []
    for text in PROBLEMS:
        operator, noise = read_operator(text)
        problem: Problem = simulated(operator, truth, noise, torch.Generator().manual_seed(2))
        guess = problem.operator.pinv(problem.y)
        results = [("pseudo-inverse", guess, float(problem.residual(guess).mean()), 0)]
        for method in methods.split(","):
            plugin, knobs = read(method, artefact)
            if method == "red_diff":
                there = simulated(operator, others, noise, torch.Generator().manual_seed(5))
                knobs = best_of(pipe, there, others, other_prompts, steps)
                method += f" {knobs}"
            results.append((method, *found(pipe, plugin, {"problem": problem, **knobs}, prompts, steps)))
        for name, x, residual, forwards in results:
            near, alike = scores(x, truth)
            table.add_row(text, name, told(near, 1), told(alike, 3), f"{residual:.4f}", str(forwards))
            each = {"psnr": near.tolist(), "ssim": alike.tolist()}
            rows.append({"problem": text, "method": name, "residual": residual, "forwards": forwards, **each})
            print(rows[-1]["problem"], name, told(near, 1), told(alike, 3), f"{residual:.4f}", forwards, flush=True)
        strips.append([part.clamp(-1, 1) for part in (truth, *(x for _, x, _, _ in results))])
    sheet = torch.cat([torch.cat([part[i] for i in range(2) for part in strip], -1) for strip in strips], -2)
    image = ((sheet + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(image).resize((image.shape[1] * 2, image.shape[0] * 2), Image.Resampling.NEAREST).save(out / "restore.png")
    (out / "restore.json").write_text(json.dumps(rows, indent=1))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
