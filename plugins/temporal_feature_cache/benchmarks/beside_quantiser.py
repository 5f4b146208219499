"""A quantised denoiser with and without its time path in floats: error of the temporal features and of pictures; and time and hits.

    python plugins/temporal_feature_cache/benchmarks/beside_quantiser.py --pipeline emoji-sd --out emoji-sd.json

For each of --bits every linear and convolution of the denoiser is rounded to the nearest, weights for each channel, activations for each
token or tensor as they come, and pictures are compared with the float ones of the same seeds. Temporal features are the outputs of all
layers of the time path at all steps. Time is that of the float pipeline with and without the plugin, in turn, from the second run on.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Sequence
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
from diffgraft.methods.inputs import CallSettings, Sample, default_steps, make_pictures, make_samples
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.layers import layers_of, put, quantised
from diffgraft_temporal_feature_cache import temporal
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn


class Nearest(Plugin):
    """Rounds all that it finds to the nearest."""

    name = "nearest"
    paper = Paper("none", "0000.00000", "rounds to the nearest")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}

    def __init__(self, bits: str) -> None:
        super().__init__()
        self.weight, self.inputs = (int(each) for each in bits[1:].split("a"))

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in list(layers_of(call.denoisers)):
            over = "token" if isinstance(layer.module, nn.Linear) else "tensor"
            inputs = None if self.inputs == 32 else UniformAffine(self.inputs, over)
            put(call.swap, layer, quantised(layer.module, UniformAffine(self.weight, "channel"), inputs))
        next(call)


@dataclass(frozen=True)
class Bench:
    """A pipeline and what is asked of it."""

    pipe: Any
    settings: CallSettings
    samples: Sequence[Sample]

    def look(self) -> tuple[list[Any], dict[str, Tensor]]:
        """(pictures, temporal features by layer, of all steps and samples)."""
        found: dict[str, list[Tensor]] = {}
        hooks = []
        for name, denoiser in denoisers_of(self.pipe, registry.find_family(type(self.pipe))).items():
            for path, layer in temporal(denoiser, nn.Linear):
                keep = found.setdefault(f"{name}.{path}", [])
                hooks.append(layer.register_forward_hook(lambda _, args, y, keep=keep: keep.append(y.detach().clone())))
        try:
            pictures = [make_pictures(self.pipe, [sample], self.settings) for sample in self.samples]
        finally:
            for hook in hooks:
                hook.remove()
        return pictures, {path: torch.stack(each) for path, each in found.items()}

    def seconds(self, runs: int) -> dict[str, list[float]]:
        """Of a picture with and without the plugin, in turn."""
        found: dict[str, list[float]] = {"without": [], "with": []}
        load_pipeline(self.pipe, plugins={"temporal_feature_cache": {"across_runs": True}})
        make_pictures(self.pipe, [self.samples[0]], self.settings)
        for _ in range(runs):
            for way, on in (("without", False), ("with", True)):
                (self.pipe.plugins.enable if on else self.pipe.plugins.disable)()
                make_pictures(self.pipe, [self.samples[0]], self.settings)  # a plugin that was off has forgotten all
                started = time.perf_counter()
                make_pictures(self.pipe, [self.samples[0]], self.settings)
                found[way].append(time.perf_counter() - started)
        unload(self.pipe)
        return found


def compared(found: tuple[list[Any], dict[str, Tensor]], reference: tuple[list[Any], dict[str, Tensor]]) -> dict[str, Any]:
    """Errors to the float pipeline: of features relative in L2 and as the mean cosine of a layer's, of pictures in dB."""
    error = sum((y - reference[1][path]).pow(2).sum() for path, y in found[1].items())
    size = sum(y.pow(2).sum() for y in reference[1].values())
    cosines = [torch.cosine_similarity(y, reference[1][path], dim=-1).mean() for path, y in found[1].items()]
    decibels = [psnr(a, b)[0] for a, b in zip(found[0], reference[0], strict=True)]
    return {
        "error": float((error / size).sqrt()),
        "cosine": float(torch.stack(cosines).mean()),
        "psnr_db": decibels,
        "mean": statistics.mean(decibels),
        "worst": min(decibels),
    }


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")],
    bits: Annotated[list[str] | None, typer.Option(help="Plans to compare (default: w4a32, w4a8, w8a8).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs on each side.")] = 5,
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Errors of features and pictures; hits, and time."""
    console = Console()
    pipe, _ = load_bare(pipeline, [], device, None)
    pipe.set_progress_bar_config(disable=True)
    settings = call_settings(steps, None, None, None, None, None, {})
    settings = replace(settings, steps=settings.steps or default_steps(pipe))
    bundled = registry.bundled_of(pipeline)
    texts = read_prompts(None, prompts) or list(bundled.prompts if bundled else ())
    bench = Bench(pipe, settings, make_samples(pipe, range(samples), texts[:samples]))
    reference, lines = bench.look(), []
    for plan in bits or ["w4a32", "w4a8", "w8a8"]:
        for way, plugins in (
            ("all rounded", [Nearest(plan)]),
            ("time path in floats", [("temporal_feature_cache", {"across_runs": True}), Nearest(plan)]),
        ):
            load_pipeline(pipe, plugins=plugins)
            found = bench.look()
            counts = {} if len(plugins) == 1 else pipe.plugins.report().plugins["temporal_feature_cache"].counts
            unload(pipe)
            lines.append({"bits": plan, "way": way, **compared(found, reference), "counts": counts})
    seconds = bench.seconds(runs)
    table = Table(title=f"{pipeline}, {settings.steps} steps, {samples} samples")
    for column in ("bits", "way", "features' error", "cosine", "PSNR dB", "worst", "of the last picture"):
        table.add_column(column)
    for each in lines:
        figures = f"{each['error']:.4f}", f"{each['cosine']:.6f}", f"{each['mean']:.2f}", f"{each['worst']:.2f}"
        table.add_row(each["bits"], each["way"], *figures, str(each["counts"] or ""))
    console.print(table)
    ratios = [b / a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    console.print(f"time with / without: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", highlight=False)
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        facts = {"pipeline": pipeline, "steps": settings.steps, "samples": samples, "machine": platform.machine()}
        facts |= {"threads": torch.get_num_threads(), "versions": versions, "seconds": seconds}
        out.write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
