"""A quantised denoiser with and without its time path in floats: error of the temporal features and of pictures; and time and hits.

    python plugins/temporal_feature_cache/benchmarks/beside_quantiser.py --pipeline emoji-sd --out emoji-sd.json

For each of --bits every linear and convolution of the denoiser is rounded to the nearest, weights for each channel, activations for each
token or tensor as they come, and pictures are compared with the float ones of the same seeds. Temporal features are the outputs of all
layers of the time path at all steps. Time is that of the float pipeline with and without the plugin, in turn, from the second run on.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer
from diffgraft.lab.held_out import Device, HeldOut, Out, PipelineName, Plans, PromptFile, Samples, Steps, decibels, feature_error
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.inputs import make_pictures
from diffgraft_temporal_feature_cache import temporal
from rich.console import Console
from rich.table import Table
from torch import nn


def time_path(bench: HeldOut) -> dict[str, nn.Module]:
    """The linear layers of the time path."""
    return {f"{name}.{path}": layer for name, model in bench.denoisers.items() for path, layer in temporal(model, nn.Linear)}


def seconds_of(bench: HeldOut, runs: int) -> dict[str, list[float]]:
    """Of a picture with and without the plugin, in turn."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    with bench.grafted(("temporal_feature_cache", {"across_runs": True})) as pipe:
        make_pictures(pipe, [bench.tested[0]], bench.settings)
        for _ in range(runs):
            for way, on in (("without", False), ("with", True)):
                (pipe.plugins.enable if on else pipe.plugins.disable)()
                make_pictures(pipe, [bench.tested[0]], bench.settings)  # a plugin that was off has forgotten all
                started = time.perf_counter()
                make_pictures(pipe, [bench.tested[0]], bench.settings)
                found[way].append(time.perf_counter() - started)
    return found


def main(
    pipeline: PipelineName,
    bits: Plans = None,
    prompts: PromptFile = None,
    samples: Samples = 4,
    steps: Steps = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs on each side.")] = 5,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Errors of features and pictures; hits, and time."""
    console = Console()
    bench, lines = HeldOut.load(pipeline, steps, prompts, samples, 0, device), []
    reference, features = bench.seeing(time_path(bench))
    plans = bits or ["w4a32", "w4a8", "w8a8"]
    for plan in plans:
        seen = {"floats": reference}
        for way, plugins in (
            ("all rounded", [Nearest(plan, over="token")]),
            ("time path in floats", [("temporal_feature_cache", {"across_runs": True}), Nearest(plan, over="token")]),
        ):
            with bench.grafted(*plugins) as pipe:
                seen[way], found = bench.seeing(time_path(bench))
                counts = {} if len(plugins) == 1 else pipe.plugins.report().plugins["temporal_feature_cache"].counts
            errors = {**feature_error(found, features), **decibels(seen[way], reference)}
            lines.append({"bits": plan, "way": way, **errors, "counts": counts})
    seconds = seconds_of(bench, runs)
    table = Table(title=bench.title)
    for column in ("bits", "way", "features' error", "cosine", "PSNR dB", "worst", "of the last picture"):
        table.add_column(column)
    for each in lines:
        figures = f"{each['error']:.4f}", f"{each['cosine']:.6f}", f"{each['mean']:.2f}", f"{each['worst']:.2f}"
        table.add_row(each["bits"], each["way"], *figures, str(each["counts"] or ""))
    console.print(table)
    ratios = [b / a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    console.print(f"time with / without: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", highlight=False)
    bench.draw(out, plans[-1], seen)
    bench.write(out, seconds=seconds, lines=lines)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
