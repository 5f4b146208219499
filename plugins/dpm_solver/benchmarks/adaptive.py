"""Adaptive steps against fixed ones at the same number of denoiser calls: error of the latents against a long solve.

    python plugins/dpm_solver/benchmarks/adaptive.py                                  # emoji-sd, 8 pictures: about a minute
    python plugins/dpm_solver/benchmarks/adaptive.py --pipeline emoji-flux --pictures 16 --out flux
    python plugins/dpm_solver/benchmarks/adaptive.py --pipeline emoji-dit

Picture i has prompt (class) and seed i in every arm, and all arms end at the same noise level. Each adaptive run is held against fixed runs
("fast", and but for flow models diffusers' DPM-Solver++ 2M) of as many calls as its pictures took on average, rounded up, so never fewer.
The ratio is that of the mean squared errors; its interval (95 %) is a bootstrap over the pictures. A ratio below 1 speaks for adaptive.
The reference is order 3 ("fixed") with --reference calls; how far it moves between half of them and all is printed beside.
Writes OUT.json and OUT.png.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import Paper, Plugin, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.evaluate import held_out_labels
from diffgraft_dpm_solver import DPMSolver
from diffusers import DPMSolverMultistepScheduler
from rich.console import Console
from rich.table import Table

BATCH = 8
TITLES = {"logsnr": "fast, logsnr", "time": "fast, time", "2M": "DPM-Solver++ 2M (diffusers)"}


class Keep(Plugin):
    """Keeps the latents of the last step, of pipelines that do not give them out (DiT) too."""

    name = "keep"
    paper = Paper("", "", "looks at the last latents")
    families = ("*",)
    neutral: dict[str, Any] = {}  # noqa: RUF012

    def step(self, call: Any, next: Any) -> Any:
        out = next(call)
        if call.step.is_last:
            halves = 2 if call.family.guidance.doubled and call.run.guidance_active() else 1
            call.record({"latents": out.sample[: len(out.sample) // halves].float()})
        return out


def conditions(pipe: Any, name: str, n: int) -> list[dict[str, Any]]:
    """Arguments of the call for each batch of pictures."""
    scale = registry.bundled()[name].guidance_scale
    guided = {} if scale is None else {"guidance_scale": scale}
    found = []
    labels = [scenes.caption(label) for label in held_out_labels()[:n]]
    for first in range(0, n, BATCH):
        rows = range(first, min(first + BATCH, n))
        given = {"class_labels": [i % 64 for i in rows]} if "DiT" in type(pipe).__name__ else {"prompt": labels[rows[0] : rows[-1] + 1]}
        seeds = [torch.Generator().manual_seed(1000 + i) for i in rows]
        found.append({**given, **guided, "generator": seeds})
    return found


def generate(pipe: Any, name: str, n: int, calls: int, plugins: list[Any]) -> tuple[torch.Tensor, np.ndarray, int]:
    """(latents [n, ...], calls of each picture [n], forced pictures)."""
    parts, took, forced = [], [], 0
    load_pipeline(pipe, plugins=[*plugins, Keep()])
    try:
        for given in conditions(pipe, name, n):
            quick = {} if "DiT" in type(pipe).__name__ else {"output_type": "latent"}
            pipe(**given, **quick, num_inference_steps=calls)
            report = pipe.plugins.report()
            latents = report.plugins["keep"].records["latents"]
            parts.append(latents)
            counts = report.plugins["dpm_solver"].records if plugins else {}
            took.append(counts["calls"].numpy() if "calls" in counts else np.full(len(latents), calls))
            forced += int((counts["forced"] > 0).sum()) if "forced" in counts else 0
    finally:
        unload(pipe)
    return torch.cat(parts), np.concatenate(took), forced


def main(
    pipeline: Annotated[str, typer.Option()] = "emoji-sd",
    pictures: Annotated[int, typer.Option(min=2)] = 8,
    reference: Annotated[int, typer.Option(help="calls, a multiple of 6")] = 240,
    tolerances: Annotated[str, typer.Option(help="rtol of the adaptive runs; atol is as many times the default")] = "0.2,0.05,0.02",
    form: Annotated[str, typer.Option()] = "data",
    out: Annotated[Path, typer.Option()] = Path("adaptive"),
) -> None:
    console = Console()
    torch.set_num_threads(1)
    pipe = unload(load_pipeline(pipeline, plugins=[]))
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    end, _, _ = generate(pipe, pipeline, pictures, reference, [DPMSolver(order=3, mode="fixed", form=form)])
    half, _, _ = generate(pipe, pipeline, pictures, reference // 2, [DPMSolver(order=3, mode="fixed", form=form)])
    moved = float((end - half).square().mean())
    console.print(f"{pipeline}: {pictures} pictures; reference {reference} calls, MSE to that of {reference // 2}: {moved:.2g}")

    def errors(calls: int, plugins: list[Any]) -> tuple[np.ndarray, np.ndarray, int]:
        latents, took, forced = generate(pipe, pipeline, pictures, calls, plugins)
        return (latents - end).square().flatten(1).mean(1).double().numpy(), took, forced

    def multistep(calls: int) -> np.ndarray:
        same = {"final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, **same)
        try:
            return errors(calls, [])[0]
        finally:
            pipe.scheduler = own

    others = ("logsnr", "time", *(() if "flow" in type(own).__name__.lower() else ("2M",)))
    rows: list[dict[str, Any]] = []
    draws = np.random.default_rng(0).integers(0, pictures, (10000, pictures))
    cache: dict[tuple[Any, ...], np.ndarray] = {}
    for order in (2, 3):
        for rtol in map(float, tolerances.split(",")):
            knobs = {"order": order, "mode": "adaptive", "rtol": rtol, "atol": 0.0078 * rtol / 0.05, "form": form}
            mse, took, forced = errors(240, [DPMSolver(**knobs)])
            n = math.ceil(took.mean())
            row: dict[str, Any] = {"arm": f"adaptive {order}", "rtol": rtol, "calls": float(took.mean()), "most": int(took.max()),
                                   "forced": forced, "mse": float(mse.mean())}  # fmt: skip
            for name in others:
                key = (name, order if name != "2M" else 2, n)
                if key not in cache:
                    cache[key] = multistep(n) if name == "2M" else errors(n, [DPMSolver(order=order, form=form, spacing=name)])[0]
                base = cache[key]
                low, high = np.quantile(mse[draws].mean(1) / base[draws].mean(1), (0.025, 0.975))
                row[name] = {"mse": float(base.mean()), "ratio": float(mse.mean() / base.mean()), "low": float(low), "high": float(high)}
            rows.append(row)
            console.print(f"  order {order}, rtol {rtol}: {took.mean():.1f} calls, MSE {mse.mean():.3g}")
    table = Table("arm", "rtol", "calls (most)", "MSE", *(head for name in others for head in (TITLES[name], "ratio")))
    for row in rows:
        cells = []
        for name in others:
            other = row[name]
            cells += [f"{other['mse']:.3g}", f"{other['ratio']:.2f} ({other['low']:.2f}-{other['high']:.2f})"]
        table.add_row(row["arm"], f"{row['rtol']:g}", f"{row['calls']:.1f} ({row['most']})", f"{row['mse']:.3g}", *cells)
    console.print(table)
    facts = {"pipeline": pipeline, "pictures": pictures, "form": form, "reference": reference, "reference_moved": moved, "rows": rows}
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1))
    draw(rows, f"{pipeline}, {pictures} pictures", out.with_suffix(".png"))


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """MSE against calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, constrained_layout=True)
    for axis, order in zip(axes, (2, 3), strict=True):
        mine = sorted((row for row in rows if row["arm"].endswith(str(order))), key=lambda row: row["calls"])
        axis.plot([row["calls"] for row in mine], [row["mse"] for row in mine], "o-", label="adaptive")
        for name, label in TITLES.items():
            if name not in mine[0]:
                continue
            axis.plot([math.ceil(row["calls"]) for row in mine], [row[name]["mse"] for row in mine], "s--", label=label, alpha=0.7)
        axis.set(xlabel="denoiser calls", yscale="log", title=f"order {order}")
    axes[0].set(ylabel="MSE of the latents")
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    typer.run(main)
