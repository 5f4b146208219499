"""ViDiT-Q against rounding to the nearest and torchao, at equal bits: error to the float picture of the same seed, and bytes.

    python plugins/vidit_q/benchmarks/against_rounding.py --pipeline emoji-flux --out emoji-flux.json
    python plugins/vidit_q/benchmarks/against_rounding.py --pipeline emoji-wan --steps 25 --samples 4 --out emoji-wan.json

Calibrates on prompts and seeds that are not measured on. For each of --bits:

    tensor              weights per output channel, activations per tensor, all rounded to the nearest
    token               the same with activations per token: vidit_q without an artefact
    balanced            vidit_q, alpha as given
    balanced, rotated   and rotated
    balanced, 2 ranges  the same with timesteps [0, 500] and [501, ...] apart
    mixed               balanced, and --mixed of the weights in 8 bits
    torchao             its own configuration for these bits, on the same layers

PSNR of pictures (of clips: over all frames), mean over the samples and the worst; bytes of the layers' weights, codes and scales as the
plan keeps them, and of torchao's as they lie in memory, both as shares of float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer
from diffgraft.lab.held_out import CalibrateOn, Device, HeldOut, Out, PipelineName, Plans, PromptFile, Samples, Steps, decibels
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.inputs import Pictures
from diffgraft.methods.quant.export import bytes_in, exported
from diffgraft.methods.quant.layers import Layer, bytes_of, quantised_in
from diffgraft_vidit_q import ViDiTQ
from diffgraft_vidit_q.calibration import wanted
from diffgraft_vidit_q.knobs import ViDiTQConfig
from rich.console import Console
from rich.table import Table


def ours(models: Mapping[str, torch.nn.Module]) -> list[Layer]:
    """The layers that vidit_q quantises."""
    return list(wanted(models, ViDiTQConfig()))


def grafted(bench: HeldOut, plugin: Any) -> tuple[list[Pictures], int, int]:
    """(pictures, bytes of the layers as the plan keeps them, bytes of the layers in floats)."""
    with bench.grafted(plugin):
        return bench.pictures(), *bytes_of(list(quantised_in(bench.denoisers).values()))


def by_torchao(bench: HeldOut, bits: str) -> tuple[list[Pictures], int]:
    """(pictures, bytes of the layers) of torchao's own configuration."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

    number = ViDiTQConfig(bits=bits).weight_bits
    config: Any = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if number < 8:
        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=getattr(torch, f"int{number}"), weight_granularity=PerAxis(0))
    models = {name: copy.deepcopy(model) for name, model in bench.denoisers.items()}
    for name, model in bench.denoisers.items():
        paths = {layer.path for layer in ours({name: model})}
        quantize_(models[name], config, filter_fn=lambda module, path, paths=paths: path in paths)
    return with_models(bench, models)


def by_export(bench: HeldOut) -> tuple[list[Pictures], int]:
    """The same of vidit_q's own export, w8a8 with symmetric grids."""
    with bench.grafted(("vidit_q", {"symmetric": True})):
        models = {name: exported(model) for name, model in bench.denoisers.items()}
    return with_models(bench, models)


def with_models(bench: HeldOut, models: Mapping[str, torch.nn.Module]) -> tuple[list[Pictures], int]:
    """(pictures of these denoisers, bytes of the layers that are quantised in them)."""
    old = dict(bench.denoisers)
    layers = [models[layer.model].get_submodule(layer.path) for layer in ours(old)]
    size = sum(bytes_in(layer) - (0 if layer.bias is None else 4 * layer.bias.numel()) for layer in layers)
    try:
        for name, model in models.items():
            setattr(bench.pipe, name, model)
        return bench.pictures(), size
    finally:
        for name, model in old.items():
            setattr(bench.pipe, name, model)


def main(
    pipeline: PipelineName,
    bits: Plans = None,
    prompts: PromptFile = None,
    samples: Samples = 6,
    calibrate_on: CalibrateOn = 6,
    steps: Steps = None,
    alpha: Annotated[float, typer.Option(min=0, max=1)] = 0.3,
    mixed: Annotated[float, typer.Option(min=0, max=1)] = 0.3,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Error and bytes of quantised transformers."""
    console = Console()
    bench = HeldOut.load(pipeline, steps, prompts, samples, calibrate_on, device)
    artefacts, seconds = {}, {}
    for name, knobs in {"balanced": {}, "balanced, 2 ranges": {"ranges": (500,)}, "mixed": {"bits": "w4a8", "mixed": mixed}}.items():
        artefacts[name], seconds[name] = bench.calibrated(ViDiTQ(**knobs))
    reference, lines = bench.pictures(), []
    seen: dict[str, list[Pictures]] = {}

    def line(plan: str, way: str, found: list[Pictures], size: int, plain: int) -> None:
        lines.append({"bits": plan, "way": way, **decibels(found, reference), "bytes": size / plain})
        seen[way] = found

    plans = bits or ["w8a8", "w6a8", "w4a8"]
    for plan in plans:
        seen = {"floats": reference}
        ways: dict[str, Any] = {"tensor": Nearest(plan, ours), "token": ViDiTQ(bits=plan)}
        ways["balanced, rotated"] = ViDiTQ(bits=plan, artefact=artefacts["balanced"], alpha=alpha, rotate=True)
        for name, artefact in artefacts.items():
            if name != "mixed" or ViDiTQConfig(bits=plan).weight_bits == 4:  # the bits that it was measured at
                ways[name] = ViDiTQ(bits=plan, artefact=artefact, alpha=alpha, **({"mixed": mixed} if name == "mixed" else {}))
        for name, plugin in ways.items():
            found, size, plain = grafted(bench, plugin)
            line(plan, name, found, size, plain)
        line(plan, "torchao", *by_torchao(bench, plan), plain)
        if plan == "w8a8":
            line(plan, "token, exported", *by_export(bench), plain)
    table = Table(title=bench.title)
    for column in ("bits", "way", "PSNR dB", "worst", "bytes"):
        table.add_column(column)
    for each in lines:
        table.add_row(each["bits"], each["way"], f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['bytes']:.3f}")
    console.print(table)
    console.print(", ".join(f"{name}: {value / 60:.2f} min to calibrate" for name, value in seconds.items()), highlight=False)
    bench.draw(out, plans[-1], seen)
    bench.write(out, alpha=alpha, mixed=mixed, seconds=seconds, lines=lines)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
