"""PTQ4DM's timesteps against uniform ones, and against rounding to the nearest: error to the float picture of the same seed.

    python plugins/ptq4dm/benchmarks/timesteps.py --pipeline emoji-pixel --steps 25 --out emoji-pixel.json

Calibrates on seeds (and prompts) that are not measured on, each way from several disjoint sets of seeds, as what is drawn decides. For each
of --bits:

    nearest         whole ranges, rounded to the nearest; activations on each tensor's own range
    normal          ptq4dm
    uniform         the same with --timesteps uniform
    official pairs  the same with official_compat

PSNR of pictures, mean over samples and sets, and the worst; and the error of single predictions: the quantised denoiser is asked what the
float one was asked in the tested runs, |e_q - e| / |e| over all steps, mean over the sets and their spread (standard deviation).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer
from diffgraft import ModulesCall
from diffgraft.lab.held_out import (
    FIRST_SEED,
    CalibrateOn,
    Device,
    HeldOut,
    Out,
    PipelineName,
    Plans,
    PromptFile,
    Samples,
    Steps,
    decibels,
)
from diffgraft.methods.quant.affine import nearest_scale
from diffgraft.methods.quant.layers import bytes_of, put, quantised_in
from diffgraft_ptq4dm import PTQ4DM
from diffgraft_ptq4dm.plan import made, wanted
from rich.console import Console
from rich.table import Table

WAYS: Mapping[str, dict[str, Any]] = {"normal": {}, "uniform": {"timesteps": "uniform"}, "official pairs": {"official_compat": True}}


class Nearest(PTQ4DM):
    """Rounds to the nearest, on whole ranges."""

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in wanted(call.denoisers, self.config):
            put(call.swap, layer, made(layer, self.config, nearest_scale))
        next(call)


class Heard:
    """What a denoiser was asked in some runs, and what it answered."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.denoiser, self.calls = denoiser, list[Any]()
        self.handle = denoiser.register_forward_hook(self.after, with_kwargs=True)

    def after(self, _: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.calls.append((args, kwargs, output[0]))

    def error(self) -> float:
        """Relative error of what it answers now."""
        pairs = [(self.denoiser(*args, **kwargs)[0], answer) for args, kwargs, answer in self.calls]
        squares = [(float((a - b).pow(2).sum()), float(b.pow(2).sum())) for a, b in pairs]
        return (sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5


def main(
    pipeline: PipelineName,
    bits: Plans = None,
    prompts: PromptFile = None,
    samples: Samples = 4,
    calibrate_on: CalibrateOn = 4,
    sets: Annotated[int, typer.Option(min=1, help="Calibration sets.")] = 3,
    draws: Annotated[int, typer.Option(min=1, help="Timesteps drawn for a sample.")] = 4,
    steps: Steps = None,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Error of U-Nets calibrated at timesteps drawn in several ways."""
    console = Console()
    bench, lines = HeldOut.load(pipeline, steps, prompts, samples, calibrate_on, device), []
    [denoiser] = bench.denoisers.values()
    heard, reference = Heard(denoiser), bench.pictures()
    heard.handle.remove()
    plans = bits or ["w8a8", "w6a6"]
    for plan in plans:
        seen = {"floats": reference}
        made_by: dict[str, list[PTQ4DM]] = {"nearest": [Nearest(bits=plan)]}
        for name, knobs in WAYS.items():
            for number in range(sets):
                found, _ = bench.from_seed(FIRST_SEED + number * calibrate_on).calibrated(PTQ4DM(bits=plan, draws=draws, **knobs))
                made_by.setdefault(name, []).append(PTQ4DM(bits=plan, artefact=found))
        for name, plugins in made_by.items():
            means, worst, errors, size = [], [], [], 1.0
            for plugin in plugins:
                with bench.grafted(plugin):
                    kept, plain = bytes_of(list(quantised_in(bench.denoisers).values()))
                    seen[name] = bench.pictures()
                    found = decibels(seen[name], reference)
                    errors.append(heard.error())
                means, worst, size = [*means, found["mean"]], [*worst, found["worst"]], kept / plain
            spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
            figures = {"psnr_db": statistics.mean(means), "worst": min(worst), "error": statistics.mean(errors), "spread": spread}
            lines.append({"bits": plan, "way": name, **figures, "bytes": size, "psnr_of_sets": means, "error_of_sets": errors})
    table = Table(title=f"{bench.title}, {sets} times, {draws} draws each")
    for column in ("bits", "way", "PSNR dB", "worst", "error", "spread", "bytes"):
        table.add_column(column)
    for each in lines:
        shown = [f"{each[name]:.2f}" for name in ("psnr_db", "worst")] + [f"{each[name]:.4f}" for name in ("error", "spread", "bytes")]
        table.add_row(each["bits"], each["way"], *shown)
    console.print(table)
    bench.draw(out, plans[-1], seen)
    bench.write(out, sets=sets, draws=draws, lines=lines)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
