"""Forecasts against other caches and against fewer steps: how near to the plain picture, in which time.

    python plugins/forecast/benchmarks/against_caches.py                                   # emoji-flux, 4 prompts: about a minute
    python plugins/forecast/benchmarks/against_caches.py --pipeline emoji-wan --samples 12 --out wan.csv

Each row is the plain pipeline's call with one thing changed. Time is that of the process (one thread), whole calls with text encoder and
VAE; every row's call is made right behind a plain one of the same prompt and seed, and a row's speed is the median of the ratios. dB: PSNR
to the plain picture. NFE: denoiser forwards of the last sample.
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import typer
from diffgraft import DiffgraftError, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.lab.metrics import psnr
from diffgraft.methods.inputs import as_array

ROWS: list[tuple[str, dict[str, Any], float]] = [
    *((f"plain, {share:.0%} of the steps", {}, share) for share in (0.8, 0.6, 0.5, 0.4, 0.3)),
    *((f"forecast {tol:g}, order {n}", {"forecast": {"tolerance": tol, "order": n}}, 1) for n in (1, 2) for tol in (0.02, 0.05, 0.1, 0.2)),
    *((f"first_block {t:g}", {"diffusers_cache": {"method": "first_block", "threshold": t}}, 1) for t in (0.05, 0.1, 0.2)),
    *((f"mag {t:g}", {"diffusers_cache": {"method": "mag", "threshold": t}}, 1) for t in (0.06, 0.12)),
    *((f"sea {t:g}", {"diffusers_cache": {"method": "sea", "threshold": t}}, 1) for t in (0.1, 0.25, 0.5)),
    *((f"deepcache {n}", {"deepcache": {"interval": n}}, 1) for n in (2, 3, 5)),
]


def main(
    pipeline: Annotated[str, typer.Option(help="a bundled checkpoint")] = "emoji-flux",
    samples: Annotated[int, typer.Option(help="prompts and seeds")] = 4,
    scheduler: Annotated[str, typer.Option(help="a class of diffusers in place of its own")] = "",
    rows: Annotated[str, typer.Option(help="only rows that begin like one of these, separated by commas")] = "",
    out: Annotated[Path | None, typer.Option(help="all numbers, as CSV")] = None,
) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    bundled = registry.bundled()[pipeline]
    plain, other = load_pipeline(pipeline), load_pipeline(pipeline)
    for pipe in (plain, other):
        pipe.set_progress_bar_config(disable=True)
        if scheduler:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)

    def call(pipe: Any, sample: int, share: float = 1.0) -> tuple[Any, float]:
        asked = {"prompt": bundled.prompts[sample % len(bundled.prompts)]} if bundled.prompts else {}
        start = time.process_time()
        made = pipe(
            **asked,
            num_inference_steps=max(2, round(share * bundled.steps)),
            generator=torch.Generator().manual_seed(1000 + sample),
            output_type="np",
        )
        return as_array(made, 1), time.process_time() - start

    ratios: list[float] | None = None

    def settings(plugins: dict[str, Any]) -> dict[str, Any]:
        """MagCache's ratios are measured on a prompt that no sample has."""
        nonlocal ratios
        if plugins.get("diffusers_cache", {}).get("method") != "mag":
            return plugins
        if ratios is None:
            pipe = load_pipeline(pipeline, {"diffusers_cache": {"method": "mag", "mag_ratios": "measure"}})
            pipe.set_progress_bar_config(disable=True)
            call(pipe, len(bundled.prompts) - 1)
            ratios = pipe.plugins.report().plugins["diffusers_cache"].records["mag_ratios.cond"].tolist()
        return {"diffusers_cache": {**plugins["diffusers_cache"], "mag_ratios": ratios}}

    print(f"{pipeline}, {bundled.steps} steps, {samples} samples; torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"{'':28} dB mean (worst)   speed   NFE")
    table: list[dict[str, Any]] = []
    for name, plugins, share in ROWS:
        if rows and not name.startswith(tuple(rows.split(","))):
            continue
        try:
            load_pipeline(unload(other) or other, settings(plugins))
        except DiffgraftError as error:
            print(f"{name:28} refused: {str(error)[:90]}")
            continue
        values, speeds = [], []
        for i in range(samples):
            (wanted, whole), (found, seconds) = call(plain, i), call(other, i, share)
            values += psnr(found, wanted)
            speeds.append(whole / seconds)
        nfe = sum(other.plugins.report().forwards.values()) if plugins else "-"
        table.append({"row": name, "dB": statistics.mean(values), "worst": min(values), "speed": statistics.median(speeds), "nfe": nfe})
        print(f"{name:28} {statistics.mean(values):6.1f} ({min(values):5.1f})   {statistics.median(speeds):5.2f}   {nfe}", flush=True)
    if out is not None:
        with out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    typer.run(main)
