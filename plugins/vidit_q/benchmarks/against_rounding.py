"""ViDiT-Q against rounding to the nearest and torchao, at equal bits: error to the float picture of the same seed, and bytes.

    python plugins/vidit_q/benchmarks/against_rounding.py --pipeline emoji-flux --out emoji-flux.json
    python plugins/vidit_q/benchmarks/against_rounding.py --pipeline emoji-wan --steps 25 --samples 4 --out emoji-wan.json

Calibrates on prompts and seeds that are not measured on. For each of --bits:

    tensor              weights per output channel, activations per tensor, all rounded to the nearest
    token               the same with activations per token: vidit_q without an artefact
    balanced            vidit_q, alpha as given
    balanced, 2 ranges  the same with timesteps [0, 500] and [501, ...] apart
    mixed               balanced, and --mixed of the weights in 8 bits
    torchao             its own configuration for these bits, on the same layers

PSNR of pictures (of clips: over all frames), mean over the samples and the worst; bytes of the layers' weights, codes and scales as the
plan keeps them, and of torchao's as they lie in memory, both as shares of float32.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import diffgraft
import diffusers
import torch
import typer
from diffgraft import ModulesCall, Paper, Plugin, denoisers_of, load_pipeline, unload
from diffgraft.cli.values import call_settings, load_bare, read_prompts
from diffgraft.installed import registry
from diffgraft.lab.metrics import psnr
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, default_steps, make_pictures, make_samples
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.export import bytes_in, exported
from diffgraft.methods.quant.layers import QuantLinear, bytes_of, put, quantised
from diffgraft_vidit_q import ViDiTQ
from diffgraft_vidit_q.calibration import wanted
from diffgraft_vidit_q.knobs import ViDiTQConfig
from rich.console import Console
from rich.table import Table


class PerTensor(Plugin):
    """Rounds to the nearest, activations with one scale a tensor."""

    name = "per_tensor"
    paper = Paper("none", "0000.00000", "rounds to the nearest")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def __init__(self, bits: str) -> None:
        super().__init__()
        self.knobs = ViDiTQConfig(bits=bits)

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in wanted(call.denoisers, self.knobs):
            grids = UniformAffine(self.knobs.weight_bits, "channel"), UniformAffine(self.knobs.input_bits)
            put(call.swap, layer, quantised(layer.module, *grids))
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

    def with_plugin(self, plugin: Any) -> tuple[list[Pictures], int, int]:
        """(pictures, bytes of the layers as the plan keeps them, bytes of the layers in floats)."""
        load_pipeline(self.pipe, plugins=[plugin])
        try:
            layers = [m for model in self.denoisers.values() for m in model.modules() if isinstance(m, QuantLinear)]
            return self.pictures(), *bytes_of(layers)
        finally:
            unload(self.pipe)

    @property
    def denoisers(self) -> Mapping[str, torch.nn.Module]:
        return denoisers_of(self.pipe, registry.find_family(type(self.pipe)))

    def with_torchao(self, bits: str) -> tuple[list[Pictures], int]:
        """(pictures, bytes of the layers)."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8DynamicActivationIntxWeightConfig, PerAxis, quantize_

        number = ViDiTQConfig(bits=bits).weight_bits
        config: Any = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
        if number < 8:
            config = Int8DynamicActivationIntxWeightConfig(weight_dtype=getattr(torch, f"int{number}"), weight_granularity=PerAxis(0))
        return self.with_models({name: self.converted(name, model, config, quantize_) for name, model in self.denoisers.items()})

    @staticmethod
    def converted(name: str, model: torch.nn.Module, config: Any, quantize: Any) -> torch.nn.Module:
        new = copy.deepcopy(model)
        own = {layer.path for layer in wanted({name: model}, ViDiTQConfig())}
        quantize(new, config, filter_fn=lambda module, path: path in own)
        return new

    def with_export(self) -> tuple[list[Pictures], int]:
        """The same of vidit_q's own export, w8a8 with symmetric grids."""
        load_pipeline(self.pipe, plugins=[("vidit_q", {"symmetric": True})])
        models = {name: exported(model) for name, model in self.denoisers.items()}
        unload(self.pipe)
        return self.with_models(models)

    def with_models(self, models: Mapping[str, torch.nn.Module]) -> tuple[list[Pictures], int]:
        """(pictures of these denoisers, bytes of the layers that are quantised in them)."""
        old = dict(self.denoisers)
        layers = [models[name].get_submodule(x.path) for name, model in old.items() for x in wanted({name: model}, ViDiTQConfig())]
        size = sum(bytes_in(layer) - (0 if layer.bias is None else 4 * layer.bias.numel()) for layer in layers)
        try:
            for name, model in models.items():
                setattr(self.pipe, name, model)
            return self.pictures(), size
        finally:
            for name, model in old.items():
                setattr(self.pipe, name, model)


def line(bits: str, way: str, found: Sequence[Pictures], reference: Sequence[Pictures], size: int, plain: int) -> dict[str, Any]:
    """A line of the table."""
    decibels = [psnr(a, b)[0] for a, b in zip(found, reference, strict=True)]
    return {"bits": bits, "way": way, "psnr_db": decibels, "mean": statistics.mean(decibels), "worst": min(decibels), "bytes": size / plain}


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")],
    bits: Annotated[list[str] | None, typer.Option(help="Plans to compare; repeat for several (default: w8a8, w6a8, w4a8).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 6,
    calibrate_on: Annotated[int, typer.Option(min=1, help="Prompts to calibrate on; none of them is compared on.")] = 6,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    alpha: Annotated[float, typer.Option(min=0, max=1)] = 0.3,
    mixed: Annotated[float, typer.Option(min=0, max=1)] = 0.3,
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Error and bytes of quantised transformers."""
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
    artefacts, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name, knobs in {"balanced": {}, "balanced, 2 ranges": {"ranges": (500,)}, "mixed": {"bits": "w4a8", "mixed": mixed}}.items():
            started = time.perf_counter()
            artefacts[name] = calibrate(pipe, ViDiTQ(**knobs), teaching, settings, Path(folder) / "artefact.safetensors")
            seconds[name] = time.perf_counter() - started
    reference, lines = bench.pictures(), []
    for plan in bits or ["w8a8", "w6a8", "w4a8"]:
        ways: dict[str, Any] = {"tensor": PerTensor(plan), "token": ViDiTQ(bits=plan)}
        for name, artefact in artefacts.items():
            if name != "mixed" or ViDiTQConfig(bits=plan).weight_bits < 8:
                ways[name] = ViDiTQ(bits=plan, artefact=artefact, alpha=alpha, **({"mixed": mixed} if name == "mixed" else {}))
        for name, plugin in ways.items():
            found, size, plain = bench.with_plugin(plugin)
            lines.append(line(plan, name, found, reference, size, plain))
        lines.append(line(plan, "torchao", *swapped(bench.with_torchao(plan), reference), plain))
        if plan == "w8a8":
            lines.append(line(plan, "token, exported", *swapped(bench.with_export(), reference), plain))
    table = Table(title=f"{pipeline}, {settings.steps} steps, {samples} samples, calibrated on {calibrate_on} prompts")
    for column in ("bits", "way", "PSNR dB", "worst", "bytes"):
        table.add_column(column)
    for each in lines:
        table.add_row(each["bits"], each["way"], f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['bytes']:.3f}")
    console.print(table)
    console.print(", ".join(f"{name}: {value / 60:.2f} min to calibrate" for name, value in seconds.items()), highlight=False)
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        known = {"pipeline": pipeline, "steps": settings.steps, "alpha": alpha, "mixed": mixed, "samples": samples}
        where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
        facts = {**known, **where, "calibrate_on": calibrate_on, "seconds": seconds}
        out.write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")


def swapped(found: tuple[list[Pictures], int], reference: Sequence[Pictures]) -> tuple[list[Pictures], Sequence[Pictures], int]:
    """Arguments of :func:`line`."""
    return found[0], reference, found[1]


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
