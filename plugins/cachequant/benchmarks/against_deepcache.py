"""CacheQuant against DeepCache and naive quantisation at equal MACs: error to the float picture of the same seed that no step skips.

    python plugins/cachequant/benchmarks/against_deepcache.py --pipeline emoji-sd --out emoji-sd.json
    python plugins/cachequant/benchmarks/against_deepcache.py --pipeline emoji-pixel --interval 3 --interval 5 --out emoji-pixel.json

Calibrates on prompts and seeds that are not measured on. For each of --interval, without quantisation:

    deepcache            uniform, branch 0
    nonuniform           deepcache's own non-uniform schedule (p = 1.4, c = a third of the steps)
    dps                  cachequant: the best schedule
    dps, corrected       and the cached feature corrected

and for each of --bits:

    nearest              every layer rounded to the nearest, weights by output channel, inputs by tensor; no step skips
    ptq                  cachequant without a cache: weights searched, shortcuts split, inputs fixed for each call
    dynamic ptq          the same with the inputs' own ranges, which "nearest" has too
    deepcache + nearest  what the paper calls the plain combination, with inputs by tensor as they come
    deepcache + ptq      the same with cachequant's grids
    dynamic, dps         cachequant with inputs="dynamic", without corrections
    dynamic cachequant   with them
    cachequant           all of it, inputs fixed for each call

PSNR of pictures, mean over the samples and the worst, and multiply-adds of a picture as a share of the plain pipeline's (of the U-Net, by
torch's counter). "better" is in how many of the samples a line's picture is nearer than that of deepcache with the same bits.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import diffgraft
import diffusers
import torch
import typer
from diffgraft import ModulesCall, Paper, Plugin, load_pipeline, unload
from diffgraft.cli.values import call_settings, load_bare, read_prompts
from diffgraft.installed import registry
from diffgraft.lab.metrics import psnr
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, default_steps, make_pictures, make_samples
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.layers import put, quantised
from diffgraft_cachequant import CacheQuant
from diffgraft_cachequant.knobs import CacheQuantConfig
from diffgraft_cachequant.layers import wanted
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode


class Nearest(Plugin):
    """Rounds to the nearest, inputs with the scale of each tensor as it comes."""

    name = "nearest"
    paper = Paper("none", "0000.00000", "rounds to the nearest")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def __init__(self, bits: str) -> None:
        super().__init__()
        self.knobs = CacheQuantConfig(bits=bits)

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in wanted(call.denoisers, self.knobs):
            bits = max(self.knobs.weight_bits, 8) if layer.path in ("conv_in", "conv_out") else self.knobs.weight_bits
            put(call.swap, layer, quantised(layer.module, UniformAffine(bits, "channel"), UniformAffine(self.knobs.input_bits)))
        next(call)


@dataclass(frozen=True)
class Bench:
    """A pipeline and what is asked of it."""

    pipe: Any
    settings: CallSettings
    samples: Sequence[Sample]

    def pictures(self) -> list[Pictures]:
        """One a sample, each in a call of its own."""
        return [make_pictures(self.pipe, [sample], self.settings) for sample in self.samples]

    def flops(self) -> int:
        """Of the denoiser in one call."""
        counts = []
        with FlopCounterMode(display=False) as counter:
            make_pictures(self.pipe, [self.samples[0]], self.settings)
            counts = [sum(counter.get_flop_counts().get(type(self.pipe.unet).__name__, {}).values())]
        return counts[0] or counter.get_total_flops()

    def measured(self, plugins: Sequence[Any]) -> tuple[list[Pictures], int]:
        """(pictures, flops of one)."""
        load_pipeline(self.pipe, plugins=list(plugins))
        try:
            return self.pictures(), self.flops()
        finally:
            unload(self.pipe)


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")],
    interval: Annotated[list[int] | None, typer.Option(help="N; repeat for several (default: 3, 5).")] = None,
    bits: Annotated[list[str] | None, typer.Option(help="Plans; repeat for several (default: w8a8, w4a8).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 6,
    calibrate_on: Annotated[int, typer.Option(min=1, help="Prompts to calibrate on; none of them is compared on.")] = 6,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Error of cached and quantised U-Nets at equal multiply-adds."""
    console = Console()
    pipe, _ = load_bare(pipeline, [], device, None)
    pipe.set_progress_bar_config(disable=True)
    settings = call_settings(steps, None, None, None, None, None, {})
    settings = replace(settings, steps=settings.steps or default_steps(pipe))
    bundled = registry.bundled_of(pipeline)
    texts = read_prompts(None, prompts) or list(bundled.prompts if bundled else ())
    if texts and len(texts) < samples + calibrate_on:
        raise typer.BadParameter(f"{len(texts)} prompts for {samples} samples and {calibrate_on} to calibrate on: give more by --prompts")
    bench = Bench(pipe, settings, make_samples(pipe, range(samples), texts[:samples]))
    teaching = make_samples(pipe, [1000 + i for i in range(calibrate_on)], texts[samples : samples + calibrate_on])
    intervals, plans = interval or [3, 5], bits or ["w8a8", "w4a8"]
    artefacts, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for plan in plans:
            for inputs in ("fixed", "dynamic"):
                started = time.perf_counter()
                plugin = CacheQuant(interval=max(intervals), bits=plan, inputs=inputs)
                artefacts[plan, inputs] = calibrate(pipe, plugin, teaching, settings, Path(folder) / "artefact.safetensors")
                seconds[f"{plan}, {inputs}"] = time.perf_counter() - started
    reference, plain, lines = bench.pictures(), bench.flops(), []

    def line(n: int, plan: str, way: str, plugins: Sequence[Any], base: Sequence[float] | None) -> list[float]:
        found, flops = bench.measured(plugins)
        decibels = [psnr(a, b)[0] for a, b in zip(found, reference, strict=True)]
        better = None if base is None else sum(a > b for a, b in zip(decibels, base, strict=True))
        row = {"interval": n, "bits": plan, "way": way, "psnr_db": decibels, "mean": statistics.mean(decibels), "worst": min(decibels)}
        lines.append({**row, "macs": flops / plain, "better": better})
        return decibels

    floats, first = {"bits": "w32a32"}, artefacts[plans[0], "fixed"]
    ours = {key: {"artefact": found, "bits": key[0], "inputs": key[1]} for key, found in artefacts.items()}
    for plan in plans:
        base = line(1, plan, "nearest", [Nearest(plan)], None)
        line(1, plan, "ptq", [CacheQuant(**ours[plan, "fixed"], interval=1)], base)
        line(1, plan, "dynamic ptq", [CacheQuant(**ours[plan, "dynamic"], interval=1)], base)
    for n in intervals:
        base = line(n, "w32a32", "deepcache", [("deepcache", {"interval": n})], None)
        center = {"skip_mode": "nonuniform", "center": settings.steps // 3}
        line(n, "w32a32", "nonuniform", [("deepcache", {"interval": n, **center})], base)
        line(n, "w32a32", "dps", [CacheQuant(artefact=first, interval=n, correct="off", **floats)], base)
        line(n, "w32a32", "dps, corrected", [CacheQuant(artefact=first, interval=n, **floats)], base)
        for plan in plans:
            fixed, dynamic = ({**ours[plan, inputs], "interval": n} for inputs in ("fixed", "dynamic"))
            base = line(n, plan, "deepcache + nearest", [Nearest(plan), ("deepcache", {"interval": n})], None)
            line(n, plan, "deepcache + ptq", [CacheQuant(schedule="uniform", correct="off", **fixed)], base)
            line(n, plan, "cachequant", [CacheQuant(**fixed)], base)
            line(n, plan, "dynamic, dps", [CacheQuant(correct="off", **dynamic)], base)
            line(n, plan, "dynamic cachequant", [CacheQuant(**dynamic)], base)
    table = Table(title=f"{pipeline}, {settings.steps} steps, {samples} samples, calibrated on {calibrate_on} prompts")
    for column in ("N", "bits", "way", "PSNR dB", "worst", "MACs", "better"):
        table.add_column(column)
    for each in lines:
        better = "" if each["better"] is None else f"{each['better']}/{samples}"
        figures = f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['macs']:.3f}"
        table.add_row(str(each["interval"]), each["bits"], each["way"], *figures, better)
    console.print(table)
    console.print(", ".join(f"{name}: {value / 60:.2f} min to calibrate" for name, value in seconds.items()), highlight=False)
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
        facts = {
            "pipeline": pipeline,
            "steps": settings.steps,
            "samples": samples,
            **where,
            "calibrate_on": calibrate_on,
            "seconds": seconds,
        }
        out.write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
