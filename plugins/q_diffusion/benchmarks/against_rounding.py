"""Q-Diffusion against rounding to the nearest, at equal bits: error to the float picture of the same seed, and bytes.

    python plugins/q_diffusion/benchmarks/against_rounding.py --pipeline emoji-sd --out emoji-sd.json
    python plugins/q_diffusion/benchmarks/against_rounding.py --pipeline emoji-pixel --bits w4a8 --steps 25 --out emoji-pixel.json

Calibrates on prompts and seeds that are not measured on. For each of --bits, all on the same layers with quantised attention:

    nearest             whole ranges, rounded to the nearest; activations on each tensor's own range
    searched            q_diffusion without an artefact: searched ranges of the weights, split shortcuts
    searched, no split  the same with split=False
    learned             q_diffusion
    learned, no split   the same with split=False, where --unsplit

PSNR of pictures, mean over the samples and the worst; bytes of the weights and scales as the plan keeps them, as a share of float32.
Before that, of each shortcut of the up blocks, on what comes to it in a run: the error with one grid over the error with two.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
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
from diffgraft.methods.quant.affine import UniformAffine, searched_scale
from diffgraft.methods.quant.layers import bytes_of, put, quantised, quantised_in
from diffgraft_q_diffusion import QDiffusion
from diffgraft_q_diffusion.knobs import QDiffusionConfig
from diffgraft_q_diffusion.plan import made, round_activations, splits_of, wanted
from rich.console import Console
from rich.table import Table

SPLITS = {way: {way: True, f"{way}, no split": False} for way in ("searched", "learned")}


class Nearest(QDiffusion):
    """Rounds to the nearest, on whole ranges."""

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in wanted(call.denoisers, self.config):
            new = made(layer, self.config, {})
            put(call.swap, layer, new)
            round_activations(new, self.config, {})
        next(call)


def pictures(pipe: Any, samples: Sequence[Sample], settings: CallSettings) -> list[Pictures]:
    """One a sample, each in a call of its own."""
    return [make_pictures(pipe, [sample], settings) for sample in samples]


def denoisers(pipe: Any) -> Mapping[str, torch.nn.Module]:
    return denoisers_of(pipe, registry.find_family(type(pipe)))


def shortcuts(pipe: Any, sample: Sample, settings: CallSettings, bits: str) -> dict[str, list[float]]:
    """Of each split shortcut (relative error of its output with one grid, with two), over all that comes to it in a run."""
    knobs, models = QDiffusionConfig(bits=bits), denoisers(pipe)
    weight, inputs = UniformAffine(knobs.weight_bits, "channel"), UniformAffine(knobs.input_bits)
    errors: dict[str, list[float]] = {}
    handles = []
    for key, split in splits_of(models).items():
        model, _, path = key.partition(".")
        layer = models[model].get_submodule(path)
        ways = [quantised(layer, weight, inputs, split=at, scale_of=searched_scale) for at in (0, split)]
        errors[key] = [0.0, 0.0, 0.0]

        def after(_: Any, args: Any, y: torch.Tensor, key: str = key, ways: Any = ways) -> None:
            found = [float((way(args[0]) - y).float().pow(2).sum()) for way in ways] + [float(y.float().pow(2).sum())]
            errors[key] = [a + b for a, b in zip(errors[key], found, strict=True)]

        handles.append(layer.register_forward_hook(after))
    make_pictures(pipe, [sample], settings)
    for handle in handles:
        handle.remove()
    return {key: [(one / all_of) ** 0.5, (two / all_of) ** 0.5] for key, (one, two, all_of) in errors.items()}


def compared(
    pipe: Any, plugin: QDiffusion, samples: Sequence[Sample], settings: CallSettings, reference: Sequence[Pictures]
) -> dict[str, Any]:
    """Figures of a line of the table."""
    load_pipeline(pipe, plugins=[plugin])
    size, plain = bytes_of(list(quantised_in(denoisers(pipe)).values()))
    decibels = [psnr(a, b)[0] for a, b in zip(pictures(pipe, samples, settings), reference, strict=True)]
    unload(pipe)
    found = {"psnr_db": decibels, "mean": statistics.mean(decibels), "worst": min(decibels), "bytes": size / plain}
    print(plugin.config.bits, found, flush=True)
    return found


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")],
    bits: Annotated[list[str] | None, typer.Option(help="Plans to compare; repeat for several (default: w8a8, w6a8, w4a8, w4a32).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 4,
    calibrate_on: Annotated[int, typer.Option(min=1, help="Prompts to calibrate on; none of them is compared on.")] = 4,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    timesteps: Annotated[int, typer.Option(min=1)] = 12,
    iterations: Annotated[int, typer.Option(min=1)] = 200,
    scale_iterations: Annotated[int, typer.Option(min=1)] = 100,
    lr: Annotated[float, typer.Option()] = 1e-2,
    softmax: Annotated[int, typer.Option()] = 8,
    unsplit: Annotated[bool, typer.Option(help="Also learned without the split: another calibration.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep the calibration files there: a benchmark that was interrupted goes on.")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Error and bytes of quantised U-Nets."""
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
    teaching = make_samples(pipe, [1000 + i for i in range(calibrate_on)], texts[samples : samples + calibrate_on])
    learning = {"timesteps": timesteps, "iterations": iterations, "scale_iterations": scale_iterations, "lr": lr, "softmax": softmax}
    reference, lines, halves = pictures(pipe, tested, settings), [], {}
    for plan in bits or ["w8a8", "w6a8", "w4a8", "w4a32"]:
        if not plan.endswith("a32"):
            halves[plan] = shortcuts(pipe, teaching[0], settings, plan)
        ways = {"nearest": Nearest(bits=plan, split=False, softmax=softmax)}
        ways |= {name: QDiffusion(bits=plan, split=split, softmax=softmax) for name, split in SPLITS["searched"].items()}
        for name, plugin in ways.items():
            lines.append({"bits": plan, "way": name, "seconds": 0.0, **compared(pipe, plugin, tested, settings, reference)})
        for name, split in SPLITS["learned"].items():
            if split or unsplit:
                started = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder:
                    plugin = QDiffusion(bits=plan, split=split, **learning)
                    artefact = calibrate(pipe, plugin, teaching, settings, (keep or Path(folder)) / f"{pipeline} {plan} {name}.safetensors")
                seconds = time.perf_counter() - started
                plugin = QDiffusion(bits=plan, split=split, softmax=softmax, artefact=artefact)
                lines.append({"bits": plan, "way": name, "seconds": seconds, **compared(pipe, plugin, tested, settings, reference)})
    table = Table(title=f"{pipeline}, {settings.steps} steps, {samples} samples, calibrated on {calibrate_on}")
    for column in ("bits", "way", "PSNR dB", "worst", "bytes", "minutes to calibrate"):
        table.add_column(column)
    for each in lines:
        shown = [f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['bytes']:.3f}", f"{each['seconds'] / 60:.2f}"]
        table.add_row(each["bits"], each["way"], *shown)
    console.print(table)
    for plan, errors in halves.items():
        worst = max(errors, key=lambda key: errors[key][0])
        one, two = errors[worst]
        better = sum(b < a for a, b in errors.values())
        console.print(f"{plan}: worst shortcut {worst}: {one:.4f} with one grid, {two:.4f} with two; {better} of {len(errors)} gain")
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        known = {"pipeline": pipeline, "steps": settings.steps, "samples": samples, "calibrate_on": calibrate_on, **learning}
        where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
        out.write_text(json.dumps({**known, **where, "lines": lines, "shortcuts": halves}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
