"""Bottleneck Sampling beside fewer steps at equal time: nearness to the full run, time, and what a judge sees in the pictures.

    python plugins/bottleneck_sampling/benchmarks/fidelity.py --pipeline emoji-sd --steps 21 --samples 24 --out out/bottleneck
    python plugins/bottleneck_sampling/benchmarks/fidelity.py --pipeline emoji-flux --steps 34 -s preset=flux \
        -s "strengths=1,0.6,0.3 shifts=own"

Rows: the full run; every setting; for every setting the plain pipeline with as many steps as cost the same: by --match time as many as take
as long (fitted through timed runs at all and at half the steps), by --match pixels as many as have the same pixels x steps, which needs
no quiet machine. Time: whole calls of one picture in turn, every other round in reverse; medians. PSNR: float pictures
against the full run's, same prompts and seeds. Judge: shares of right pictures, where the bundled checkpoint has one. Writes
fidelity.json and fidelity.png into --out.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import ConfigError, load_pipeline
from diffgraft.installed import registry
from diffgraft.lab.figures import fidelity_of, fit_steps
from diffgraft.lab.instruments import synchronize
from diffgraft.lab.judging import as_seen, load_judge, summarise, understood_by
from diffgraft.lab.machine import machine, versions
from diffgraft.lab.metrics import Spread
from diffgraft.lab.pictures import draw_grid, to_images
from diffgraft.lab.results import plain
from diffgraft.methods.files import write_atomic
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, make_pictures, make_samples
from diffgraft_bottleneck_sampling import OF_A_STAGE, method
from rich.console import Console
from rich.table import Column, Table

NAME = "bottleneck_sampling"
SETTINGS = ["preset=flux", "preset=hunyuan_video", "shifts=own"]


@dataclass
class Row:
    """One side: plugin knobs (None: the plain pipeline) and steps; what was measured."""

    name: str
    steps: int
    knobs: dict[str, Any] | None = None
    seconds: list[float] = field(default_factory=list)
    pictures: Any = None
    result: dict[str, Any] = field(default_factory=dict)


def knobs_of(text: str) -> dict[str, Any]:
    """``"scales=1,0.5,1 shares=6,20,8"`` as knobs."""
    knobs: dict[str, Any] = {}
    for part in text.split():
        key, sign, value = part.partition("=")
        if not sign:
            raise ConfigError(f"--setting {text!r}: {part!r} is not knob=value")
        numbers = [float(item) for item in value.split(",")] if value.replace(",", "").replace(".", "").isdigit() else None
        knobs[key] = value if numbers is None else tuple(numbers) if key in OF_A_STAGE else int(numbers[0])
    return knobs


class Bench:
    """One pipeline with the plugin on it, switched on and off for its rows."""

    def __init__(self, pipe: Any, samples: list[Sample], call: CallSettings, batch: int) -> None:
        self.pipe, self.samples, self.call, self.batch = pipe, samples, call, batch

    def run(self, row: Row, samples: list[Sample]) -> tuple[Pictures, float]:
        """Pictures of one call, and its seconds."""
        call = CallSettings(row.steps, self.call.guidance_scale, None, self.call.height, self.call.width, extra=self.call.extra)
        if row.knobs is None:
            self.pipe.plugins.disable(NAME)
        else:
            self.pipe.plugins.enable(NAME)
            if self.pipe.plugins[NAME].config != type(self.pipe.plugins[NAME])(**row.knobs).config:
                self.pipe.plugins.configure(NAME, **{**default_knobs(), **row.knobs})
        device = torch.device(self.pipe.device)
        synchronize(device)
        started = time.perf_counter()
        pictures = make_pictures(self.pipe, samples, call)
        synchronize(device)
        return pictures, time.perf_counter() - started

    def time(self, rows: list[Row], rounds: int) -> None:
        """Every row once a round, one picture a call, every other round in reverse; one call of each before."""
        for row in rows:
            self.run(row, self.samples[:1])
        for i in range(rounds):
            sample = self.samples[i % len(self.samples)]
            for row in rows if i % 2 == 0 else rows[::-1]:
                row.seconds.append(self.run(row, [sample])[1])

    def draw(self, row: Row) -> None:
        """The row's pictures, [samples, frames, height, width, 3]."""
        parts = [self.run(row, self.samples[i : i + self.batch])[0] for i in range(0, len(self.samples), self.batch)]
        row.pictures = np.concatenate(parts)


def default_knobs() -> dict[str, Any]:
    """All knobs at their defaults, so that a setting leaves nothing of the one before."""
    return {key: item.default for key, item in registry.find(NAME).Config.model_fields.items()}


def equal_time_rows(bench: Bench, full: Row, settings: list[Row], rounds: int) -> list[Row]:
    """For every setting the plain pipeline with the steps that take as long."""
    half = Row("half", max(1, full.steps // 2))
    pilots = [Row("full", full.steps), half, *(Row(row.name, row.steps, row.knobs) for row in settings)]
    bench.time(pilots, rounds)
    medians = [statistics.median(row.seconds) for row in pilots]
    rows = []
    for row, target in zip(settings, medians[2:], strict=True):
        steps = fit_steps(full.steps, medians[0], half.steps, medians[1], target, row.name, {}).steps
        if steps not in [other.steps for other in rows]:
            rows.append(Row(f"{steps} steps", steps))
    return rows


def equal_work_rows(settings: list[Row]) -> list[Row]:
    """For every setting the plain pipeline with the steps that have as many pixels x steps."""
    rows: list[Row] = []
    for row in settings:
        config = registry.find(NAME)(**(row.knobs or {})).config
        shares, strengths, scales = (config.of_stages(name) for name in ("shares", "strengths", "scales"))
        counts = method.stage_steps(row.steps, shares)
        counts = [method.rounded(N * w) for N, w in zip(counts, strengths, strict=True)] if config.runs == "part" else counts
        steps = round(row.steps * method.work(counts, [scale**2 for scale in scales], row.steps))
        if steps not in [other.steps for other in rows]:
            rows.append(Row(f"{steps} steps", steps))
    return rows


def main(
    pipeline: Annotated[str, typer.Option(help="bundled name, folder or Hub id")] = "emoji-sd",
    steps: Annotated[int, typer.Option(help="steps of the full run and of every setting")] = 21,
    setting: Annotated[list[str], typer.Option("--setting", "-s", help="knobs of one row, 'scales=1,0.5,1 shares=6,20,8'")] = SETTINGS,
    samples: Annotated[int, typer.Option(help="pictures of every row")] = 24,
    rounds: Annotated[int, typer.Option(help="timed rounds")] = 7,
    match: Annotated[str, typer.Option(help="what 'fewer steps' is equal in: time or pixels")] = "time",
    batch: Annotated[int, typer.Option(help="pictures in one call, when they are not timed")] = 8,
    prompt: Annotated[list[str], typer.Option(help="instead of the bundled prompts")] = [],  # noqa: B006
    device: str = "cpu",
    dtype: str = "float32",
    height: int | None = None,
    width: int | None = None,
    shown: Annotated[int, typer.Option(help="columns of the picture grid")] = 8,
    out: Path = Path("bottleneck_fidelity"),
) -> None:
    """Measure, print a table, write fidelity.json and fidelity.png."""
    console = Console(width=None if sys.stdout.isatty() else 150)  # a log has no width of its own
    bundled = registry.find_bundled(pipeline) if pipeline in registry.bundled_names() else None
    prompts = prompt or list(bundled.prompts if bundled else ["a red apple on a wooden table"])
    if match not in ("time", "pixels"):
        raise typer.BadParameter(f"--match {match}: time or pixels")
    pipe = load_pipeline(pipeline, plugins=[NAME], dtype=getattr(torch, dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    call = CallSettings(None, bundled.guidance_scale if bundled else None, None, height, width, extra=dict(bundled.call) if bundled else {})
    bench = Bench(pipe, make_samples(pipe, range(samples), prompts), call, batch)

    full = Row(f"full, {steps} steps", steps)
    rows = [Row(text, steps, knobs_of(text)) for text in setting]
    for row in rows:
        bench.pipe.plugins.configure(NAME, **{**default_knobs(), **(row.knobs or {})})  # refuses bad knobs before anything is measured
    fewer = equal_work_rows(rows) if match == "pixels" else equal_time_rows(bench, full, rows, max(3, rounds // 2))
    rows = [full, *rows, *fewer]
    bench.time(rows, rounds)
    for row in rows:
        bench.draw(row)

    judge = load_judge(bundled) if bundled else None
    texts = [sample.prompt or "" for sample in bench.samples]
    understood = understood_by(judge, texts, full.pictures)[0] if judge else []
    raws = (
        [judge.score([as_seen(row.pictures[i]) for i in understood], [texts[i] for i in understood]) for row in rows] if understood else []
    )
    base = statistics.median(full.seconds)
    table = Table(Column("row", no_wrap=True), "steps", "seconds", "speed-up", "PSNR dB (worst)", "SSIM", "judge: all right")
    for i, row in enumerate(rows):
        near, spread = fidelity_of(row.pictures, full.pictures), Spread.of(row.seconds)
        verdicts = summarise(raws[i], raws[0]).shares if raws else {}
        row.result = {"row": row.name, "steps": row.steps, "knobs": row.knobs, "seconds": spread, "speed_up": base / spread.p50}
        row.result |= {"fidelity": near, "judge": verdicts}
        psnr = "equal" if near.psnr_mean is None else f"{near.psnr_mean:.1f} ({near.psnr_worst:.1f})"
        ssim = "" if near.ssim_mean is None else f"{near.ssim_mean:.3f}"
        right = f"{verdicts['all'].share:.0%} [{verdicts['all'].low:.0%}, {verdicts['all'].high:.0%}]" if "all" in verdicts else ""
        table.add_row(row.name, str(row.steps), f"{spread.p50:.3f}", f"{base / spread.p50:.2f}x", psnr, ssim, right)
    console.print(table)

    facts = {"pipeline": pipeline, "samples": samples, "rounds": rounds, "dtype": dtype, "versions": versions(), **machine(pipe.device)}
    write_atomic(out / "fidelity.json", json.dumps(plain({**facts, "rows": [row.result for row in rows]}), indent=1).encode())
    lines = [([row.name, f"{row.result['speed_up']:.2f}x"], [to_images(frames)[0] for frames in row.pictures[:shown]]) for row in rows]
    grid = draw_grid(f"Bottleneck Sampling on {pipeline}", f"{steps} steps, same seeds and prompts", texts[:shown], lines, side=128)
    grid.save(out / "fidelity.png")
    console.print(f"{out}/fidelity.json, {out}/fidelity.png")


if __name__ == "__main__":
    typer.run(main)
