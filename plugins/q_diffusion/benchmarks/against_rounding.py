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

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffgraft import ModulesCall
from diffgraft.lab.held_out import CalibrateOn, Device, HeldOut, Out, PipelineName, Plans, PromptFile, Samples, Steps, decibels
from diffgraft.methods.inputs import Pictures, make_pictures
from diffgraft.methods.quant.affine import searched_scale
from diffgraft.methods.quant.knobs import inputs_of, weights_of
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


def shortcuts(bench: HeldOut, bits: str) -> dict[str, list[float]]:
    """Of each split shortcut (relative error of its output with one grid, with two), over all that comes to it in a run."""
    knobs, models = QDiffusionConfig(bits=bits), bench.denoisers
    weight, inputs = weights_of(knobs.weight_bits), inputs_of(knobs.input_bits)
    errors: dict[str, list[float]] = {}
    handles = []
    for key, split in splits_of(models).items():
        model, _, path = key.partition(".")
        layer = models[model].get_submodule(path)
        ways = [quantised(layer, weight, inputs, split=at, scale_of=searched_scale) for at in (0, split)]
        errors[key] = [0.0, 0.0, 0.0]

        # the layers in its place carry this hook too: asked past it
        def after(_: Any, args: Any, y: torch.Tensor, key: str = key, ways: Any = ways) -> None:
            found = [float((way.forward(args[0]) - y).float().pow(2).sum()) for way in ways] + [float(y.float().pow(2).sum())]
            errors[key] = [a + b for a, b in zip(errors[key], found, strict=True)]

        handles.append(layer.register_forward_hook(after))
    make_pictures(bench.pipe, [bench.teaching[0]], bench.settings)
    for handle in handles:
        handle.remove()
    return {key: [(one / all_of) ** 0.5, (two / all_of) ** 0.5] for key, (one, two, all_of) in errors.items()}


def compared(bench: HeldOut, plugin: QDiffusion, reference: Any) -> tuple[list[Pictures], dict[str, Any]]:
    """(pictures, figures of a line of the table)."""
    with bench.grafted(plugin):
        size, plain = bytes_of(list(quantised_in(bench.denoisers).values()))
        made = bench.pictures()
    found = {**decibels(made, reference), "bytes": size / plain}
    print(plugin.config.bits, found, flush=True)
    return made, found


def main(
    pipeline: PipelineName,
    bits: Plans = None,
    prompts: PromptFile = None,
    samples: Samples = 4,
    calibrate_on: CalibrateOn = 4,
    steps: Steps = None,
    timesteps: Annotated[int, typer.Option(min=1)] = 12,
    iterations: Annotated[int, typer.Option(min=1)] = 200,
    scale_iterations: Annotated[int, typer.Option(min=1)] = 100,
    lr: Annotated[float, typer.Option()] = 1e-2,
    softmax: Annotated[int, typer.Option()] = 8,
    unsplit: Annotated[bool, typer.Option(help="Also learned without the split: another calibration.")] = False,
    keep: Annotated[Path | None, typer.Option(help="Keep the calibration files there: a benchmark that was interrupted goes on.")] = None,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Error and bytes of quantised U-Nets."""
    console = Console()
    bench = HeldOut.load(pipeline, steps, prompts, samples, calibrate_on, device)
    learning = {"timesteps": timesteps, "iterations": iterations, "scale_iterations": scale_iterations, "lr": lr, "softmax": softmax}
    reference, lines, halves = bench.pictures(), [], {}
    plans = bits or ["w8a8", "w6a8", "w4a8", "w4a32"]
    for plan in plans:
        seen = {"floats": reference}
        if not plan.endswith("a32"):
            halves[plan] = shortcuts(bench, plan)
        ways = {"nearest": Nearest(bits=plan, split=False, softmax=softmax)}
        ways |= {name: QDiffusion(bits=plan, split=split, softmax=softmax) for name, split in SPLITS["searched"].items()}
        for name, plugin in ways.items():
            seen[name], figures = compared(bench, plugin, reference)
            lines.append({"bits": plan, "way": name, "seconds": 0.0, **figures})
        for name, split in SPLITS["learned"].items():
            if split or unsplit:
                kept = None if keep is None else keep / f"{pipeline} {plan} {name}.safetensors"
                artefact, seconds = bench.calibrated(QDiffusion(bits=plan, split=split, **learning), kept)
                plugin = QDiffusion(bits=plan, split=split, softmax=softmax, artefact=artefact)
                seen[name], figures = compared(bench, plugin, reference)
                lines.append({"bits": plan, "way": name, "seconds": seconds, **figures})
    table = Table(title=bench.title)
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
    bench.draw(out, plans[-1], seen)
    bench.write(out, **learning, lines=lines, shortcuts=halves)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
