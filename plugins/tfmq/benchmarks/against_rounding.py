"""TFMQ against plain post-training quantisation at equal bits: error of the temporal features, and of pictures of the same seeds.

    python plugins/tfmq/benchmarks/against_rounding.py --pipeline emoji-sd --out emoji-sd.json

Calibrates on prompts and seeds that are not measured on. For each of --bits, all on the same layers:

    nearest            whole ranges of the weights, rounded to the nearest; inputs on the range of what comes in: tfmq without an artefact
    plain              searched ranges, rounded to the nearest; one calibrated scale for a layer's inputs at all timesteps
    plain, timesteps   the same with a scale for each timestep: finite set calibration alone
    learned            the time path's rounding learned, one scale: reconstruction alone
    tfmq               both

Temporal features are the outputs of the blocks' projections of the time embedding, at all steps, inputs quantised too.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from diffgraft.lab.held_out import (
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
    feature_error,
)
from diffgraft.methods.quant.layers import bytes_of, quantised_in
from diffgraft_tfmq import TFMQ
from diffgraft_tfmq.path import TimePath
from rich.console import Console
from rich.table import Table
from torch import nn


def projections(bench: HeldOut) -> dict[str, nn.Module]:
    """Layers that make the temporal features, of each block its own."""
    found = {name: TimePath(denoiser).blocks for name, denoiser in bench.denoisers.items()}
    return {f"{name}.{number}": block.time_emb_proj for name, blocks in found.items() for number, block in enumerate(blocks)}


def main(
    pipeline: PipelineName,
    bits: Plans = None,
    prompts: PromptFile = None,
    samples: Samples = 6,
    calibrate_on: CalibrateOn = 6,
    steps: Steps = None,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of Adam that learn the time path's rounding.")] = 20_000,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Errors of quantised U-Nets."""
    console = Console()
    bench, lines = HeldOut.load(pipeline, steps, prompts, samples, calibrate_on, device), []
    reference, features = bench.seeing(projections(bench))
    ways: dict[str, dict[str, Any] | None] = {
        "nearest": None,
        "plain": {"iterations": 0, "scales": "one"},
        "plain, timesteps": {"iterations": 0},
        "learned": {"iterations": iterations, "scales": "one"},
        "tfmq": {"iterations": iterations},
    }
    plans = bits or ["w8a8", "w4a8", "w4a32"]
    for plan in plans:
        seen = {"floats": reference}
        for way, knobs in ways.items():
            if plan.endswith("a32") and way in ("plain, timesteps", "tfmq"):
                continue  # no inputs to scale: as "plain" and as "learned"
            artefact, seconds = (None, 0.0) if knobs is None else bench.calibrated(TFMQ(bits=plan, **knobs))
            with bench.grafted(("tfmq", {"bits": plan, "artefact": artefact})):
                seen[way], found = bench.seeing(projections(bench))
                kept, plain = bytes_of(list(quantised_in(bench.denoisers).values()))
            facts = {} if artefact is None else {name: artefact.facts[name] for name in ("distance", "cosine")}
            errors = {**feature_error(found, features), **decibels(seen[way], reference)}
            lines.append({"bits": plan, "way": way, **errors, "bytes": kept / plain, "seconds": seconds, "learned": facts})
            console.print(plan, way, f"{lines[-1]['error']:.4f}", f"{lines[-1]['mean']:.2f}", f"{seconds:.0f} s", highlight=False)
    table = Table(title=bench.title)
    for column in ("bits", "way", "features' error", "cosine", "PSNR dB", "worst", "bytes"):
        table.add_column(column)
    for each in lines:
        figures = f"{each['error']:.4f}", f"{each['cosine']:.6f}", f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['bytes']:.3f}"
        table.add_row(each["bits"], each["way"], *figures)
    console.print(table)
    bench.draw(out, plans[-1], seen)
    bench.write(out, iterations=iterations, lines=lines)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
