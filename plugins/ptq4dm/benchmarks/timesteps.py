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

import json
import platform
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import diffgraft
import diffusers
import torch
import typer
from diffgraft import ModulesCall, denoisers_of, load_pipeline, unload
from diffgraft.cli.values import call_settings, load_bare, read_prompts
from diffgraft.installed import registry
from diffgraft.lab.metrics import psnr
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, default_steps, make_pictures, make_samples
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


def pictures(pipe: Any, samples: Sequence[Sample], settings: CallSettings) -> list[Pictures]:
    """One a sample, each in a call of its own."""
    return [make_pictures(pipe, [sample], settings) for sample in samples]


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
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")],
    bits: Annotated[list[str] | None, typer.Option(help="Plans to compare; repeat for several (default: w8a8, w6a6).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 4,
    calibrate_on: Annotated[int, typer.Option(min=1, help="Samples of a calibration set; none of them is compared on.")] = 4,
    sets: Annotated[int, typer.Option(min=1, help="Calibration sets.")] = 3,
    draws: Annotated[int, typer.Option(min=1, help="Timesteps drawn for a sample.")] = 4,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Error of U-Nets calibrated at timesteps drawn in several ways."""
    console = Console()
    pipe, _ = load_bare(pipeline, [], device, None)
    pipe.set_progress_bar_config(disable=True)
    settings = call_settings(steps, None, None, None, None, None, {})
    settings = replace(settings, steps=settings.steps or default_steps(pipe))
    bundled = registry.bundled_of(pipeline)
    texts = read_prompts(None, prompts) or list(bundled.prompts if bundled else ())
    if texts and len(texts) < samples + calibrate_on:
        raise typer.BadParameter(f"{len(texts)} prompts for {samples} samples and {calibrate_on} to calibrate on: give more by --prompts")
    tested = make_samples(pipe, range(samples), texts[:samples])
    [denoiser] = denoisers_of(pipe, registry.find_family(type(pipe))).values()
    heard, lines = Heard(denoiser), []
    reference = pictures(pipe, tested, settings)
    heard.handle.remove()
    for plan in bits or ["w8a8", "w6a6"]:
        made_by: dict[str, list[PTQ4DM]] = {"nearest": [Nearest(bits=plan)]}
        for name, knobs in WAYS.items():
            for number in range(sets):
                seeds = [1000 + number * calibrate_on + i for i in range(calibrate_on)]
                teaching = make_samples(pipe, seeds, texts[samples : samples + calibrate_on])
                with tempfile.TemporaryDirectory() as folder:
                    found = calibrate(pipe, PTQ4DM(bits=plan, draws=draws, **knobs), teaching, settings, Path(folder) / "a.safetensors")
                made_by.setdefault(name, []).append(PTQ4DM(bits=plan, artefact=found))
        for name, plugins in made_by.items():
            means, worst, errors, size = [], [], [], 1.0
            for plugin in plugins:
                load_pipeline(pipe, plugins=[plugin])
                kept, plain = bytes_of(list(quantised_in(denoisers_of(pipe, registry.find_family(type(pipe)))).values()))
                decibels = [psnr(a, b)[0] for a, b in zip(pictures(pipe, tested, settings), reference, strict=True)]
                errors.append(heard.error())
                unload(pipe)
                means, worst, size = [*means, statistics.mean(decibels)], [*worst, min(decibels)], kept / plain
            spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
            figures = {"psnr_db": statistics.mean(means), "worst": min(worst), "error": statistics.mean(errors), "spread": spread}
            lines.append({"bits": plan, "way": name, **figures, "bytes": size, "psnr_of_sets": means, "error_of_sets": errors})
    table = Table(
        title=f"{pipeline}, {settings.steps} steps, {samples} samples, {sets} sets of {calibrate_on} samples and {draws} draws each"
    )
    for column in ("bits", "way", "PSNR dB", "worst", "error", "spread", "bytes"):
        table.add_column(column)
    for each in lines:
        shown = [f"{each[name]:.2f}" for name in ("psnr_db", "worst")] + [f"{each[name]:.4f}" for name in ("error", "spread", "bytes")]
        table.add_row(each["bits"], each["way"], *shown)
    console.print(table)
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        known = {"pipeline": pipeline, "steps": settings.steps, "samples": samples, "calibrate_on": calibrate_on, "draws": draws}
        out.write_text(json.dumps({**known, "machine": platform.machine(), "versions": versions, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
