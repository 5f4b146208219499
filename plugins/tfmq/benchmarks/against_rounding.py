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

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import diffgraft
import diffusers
import torch
import typer
from diffgraft import denoisers_of, load_pipeline, unload
from diffgraft.cli.values import call_settings, load_bare, read_prompts
from diffgraft.installed import registry
from diffgraft.lab.metrics import psnr
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Sample, default_steps, make_pictures, make_samples
from diffgraft.methods.quant.layers import bytes_of
from diffgraft_tfmq import TFMQ, quantised_in
from diffgraft_tfmq.path import TimePath
from rich.console import Console
from rich.table import Table
from torch import Tensor

Seen = tuple[list[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Bench:
    """A pipeline and what is asked of it."""

    pipe: Any
    settings: CallSettings
    samples: Sequence[Sample]

    def look(self) -> Seen:
        """(pictures, temporal features of each block, of all steps and samples)."""
        found: dict[str, list[Tensor]] = {}
        hooks = []
        for name, denoiser in denoisers_of(self.pipe, registry.find_family(type(self.pipe))).items():
            for number, block in enumerate(TimePath(denoiser).blocks):
                keep = found.setdefault(f"{name}.{number}", [])
                hooks.append(block.time_emb_proj.register_forward_hook(lambda _, args, y, keep=keep: keep.append(y.detach().clone())))
        try:
            pictures = [make_pictures(self.pipe, [sample], self.settings) for sample in self.samples]
        finally:
            for hook in hooks:
                hook.remove()
        return pictures, {path: torch.cat(each) for path, each in found.items()}


def compared(found: Seen, reference: Seen) -> dict[str, Any]:
    """Errors to the float pipeline: of features relative in L2 and as mean cosine, of pictures in dB."""
    error = sum((y - reference[1][path]).pow(2).sum() for path, y in found[1].items())
    size = sum(y.pow(2).sum() for y in reference[1].values())
    joined = [torch.cat(list(each[1].values()), 1) for each in (found, reference)]
    decibels = [psnr(a, b)[0] for a, b in zip(found[0], reference[0], strict=True)]
    return {
        "error": float((error / size).sqrt()),  # type: ignore[union-attr]
        "cosine": float(torch.cosine_similarity(*joined, dim=1).mean()),
        "psnr_db": decibels,
        "mean": statistics.mean(decibels),
        "worst": min(decibels),
    }


def main(
    pipeline: Annotated[str, typer.Option(help="A bundled name, a folder or a Hub id.")],
    bits: Annotated[list[str] | None, typer.Option(help="Plans to compare; repeat for several (default: w8a8, w4a8, w4a32).")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with one prompt a line (default: the bundled pipeline's).")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to compare.")] = 6,
    calibrate_on: Annotated[int, typer.Option(min=1, help="Prompts to calibrate on; none of them is compared on.")] = 6,
    steps: Annotated[int | None, typer.Option(min=2)] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Steps of Adam that learn the time path's rounding.")] = 20_000,
    device: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures there as JSON.")] = None,
) -> None:
    """Errors of quantised U-Nets."""
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
    reference, lines = bench.look(), []
    ways: dict[str, dict[str, Any] | None] = {
        "nearest": None,
        "plain": {"iterations": 0, "scales": "one"},
        "plain, timesteps": {"iterations": 0},
        "learned": {"iterations": iterations, "scales": "one"},
        "tfmq": {"iterations": iterations},
    }
    for plan in bits or ["w8a8", "w4a8", "w4a32"]:
        for way, knobs in ways.items():
            if plan.endswith("a32") and way in ("plain, timesteps", "tfmq"):
                continue  # no inputs to scale: as "plain" and as "learned"
            artefact, started = None, time.perf_counter()
            if knobs is not None:
                with tempfile.TemporaryDirectory() as folder:
                    artefact = calibrate(pipe, TFMQ(bits=plan, **knobs), teaching, settings, Path(folder) / "artefact.safetensors")
            seconds = time.perf_counter() - started
            load_pipeline(pipe, plugins=[("tfmq", {"bits": plan, "artefact": artefact})])
            found = bench.look()
            kept, plain = bytes_of(quantised_in(denoisers_of(pipe, registry.find_family(type(pipe)))))
            unload(pipe)
            facts = {} if artefact is None else {name: artefact.facts[name] for name in ("distance", "cosine")}
            lines.append(
                {"bits": plan, "way": way, **compared(found, reference), "bytes": kept / plain, "seconds": seconds, "learned": facts}
            )
            console.print(plan, way, f"{lines[-1]['error']:.4f}", f"{lines[-1]['mean']:.2f}", f"{seconds:.0f} s", highlight=False)
    table = Table(title=f"{pipeline}, {settings.steps} steps, {samples} samples, calibrated on {calibrate_on}")
    for column in ("bits", "way", "features' error", "cosine", "PSNR dB", "worst", "bytes"):
        table.add_column(column)
    for each in lines:
        figures = f"{each['error']:.4f}", f"{each['cosine']:.6f}", f"{each['mean']:.2f}", f"{each['worst']:.2f}", f"{each['bytes']:.3f}"
        table.add_row(each["bits"], each["way"], *figures)
    console.print(table)
    if out is not None:
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffgraft": diffgraft.__version__}
        known = {"pipeline": pipeline, "steps": settings.steps, "samples": samples, "calibrate_on": calibrate_on, "iterations": iterations}
        where = {"machine": platform.machine(), "threads": torch.get_num_threads(), "versions": versions}
        out.write_text(json.dumps({**known, **where, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
