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

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from diffgraft.lab.held_out import CalibrateOn, Device, HeldOut, Out, PipelineName, Plans, PromptFile, Samples, Steps, decibels
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.inputs import make_pictures
from diffgraft_cachequant import CacheQuant
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode


def flops(bench: HeldOut) -> int:
    """Of the denoiser in one call."""
    with FlopCounterMode(display=False) as counter:
        make_pictures(bench.pipe, [bench.tested[0]], bench.settings)
        of_unet = sum(counter.get_flop_counts().get(type(bench.pipe.unet).__name__, {}).values())
    return of_unet or counter.get_total_flops()


def main(
    pipeline: PipelineName,
    interval: Annotated[list[int] | None, typer.Option(help="N; repeat for several (default: 3, 5).")] = None,
    bits: Plans = None,
    prompts: PromptFile = None,
    samples: Samples = 6,
    calibrate_on: CalibrateOn = 6,
    steps: Steps = None,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Error of cached and quantised U-Nets at equal multiply-adds."""
    console = Console()
    bench = HeldOut.load(pipeline, steps, prompts, samples, calibrate_on, device)
    intervals, plans = interval or [3, 5], bits or ["w8a8", "w4a8"]
    artefacts, seconds = {}, {}
    for plan in plans:
        for inputs in ("fixed", "dynamic"):
            plugin = CacheQuant(interval=max(intervals), bits=plan, inputs=inputs)
            artefacts[plan, inputs], seconds[f"{plan}, {inputs}"] = bench.calibrated(plugin)
    reference, plain, lines = bench.pictures(), flops(bench), []
    seen = {"floats": reference}

    def line(n: int, plan: str, way: str, plugins: Sequence[Any], base: Sequence[float] | None) -> list[float]:
        with bench.grafted(*plugins):
            made, asked = bench.pictures(), flops(bench)
        found = decibels(made, reference)
        if n == intervals[-1] and plan == plans[-1]:
            seen[way] = made
        better = None if base is None else sum(a > b for a, b in zip(found["psnr_db"], base, strict=True))
        lines.append({"interval": n, "bits": plan, "way": way, **found, "macs": asked / plain, "better": better})
        return found["psnr_db"]

    floats, first = {"bits": "w32a32"}, artefacts[plans[0], "fixed"]
    ours = {key: {"artefact": found, "bits": key[0], "inputs": key[1]} for key, found in artefacts.items()}
    for plan in plans:
        base = line(1, plan, "nearest", [Nearest(plan, ends=8)], None)
        line(1, plan, "ptq", [CacheQuant(**ours[plan, "fixed"], interval=1)], base)
        line(1, plan, "dynamic ptq", [CacheQuant(**ours[plan, "dynamic"], interval=1)], base)
    for n in intervals:
        base = line(n, "w32a32", "deepcache", [("deepcache", {"interval": n})], None)
        center = {"skip_mode": "nonuniform", "center": (bench.settings.steps or 0) // 3}
        line(n, "w32a32", "nonuniform", [("deepcache", {"interval": n, **center})], base)
        line(n, "w32a32", "dps", [CacheQuant(artefact=first, interval=n, correct="off", **floats)], base)
        line(n, "w32a32", "dps, corrected", [CacheQuant(artefact=first, interval=n, **floats)], base)
        for plan in plans:
            fixed, dynamic = ({**ours[plan, inputs], "interval": n} for inputs in ("fixed", "dynamic"))
            base = line(n, plan, "deepcache + nearest", [Nearest(plan, ends=8), ("deepcache", {"interval": n})], None)
            line(n, plan, "deepcache + ptq", [CacheQuant(schedule="uniform", correct="off", **fixed)], base)
            line(n, plan, "cachequant", [CacheQuant(**fixed)], base)
            line(n, plan, "dynamic, dps", [CacheQuant(correct="off", **dynamic)], base)
            line(n, plan, "dynamic cachequant", [CacheQuant(**dynamic)], base)
    table = Table(title=bench.title)
    for column in ("N", "bits", "way", "PSNR dB", "worst", "MACs", "better"):
        table.add_column(column)
    for each in lines:
        better = "" if each["better"] is None else f"{each['better']}/{samples}"
        figures = f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['macs']:.3f}"
        table.add_row(str(each["interval"]), each["bits"], each["way"], *figures, better)
    console.print(table)
    console.print(", ".join(f"{name}: {value / 60:.2f} min to calibrate" for name, value in seconds.items()), highlight=False)
    bench.draw(out, f"{plans[-1]}, interval={intervals[-1]}", seen)
    bench.write(out, seconds=seconds, lines=lines)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
