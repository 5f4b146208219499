"""One benchmark for all methods that quantise: five bundled checkpoints, four plans of bits, ours beside what the others' packages do.

    python -m pip install torchao optimum-quanto bitsandbytes         # each that is missing is left out, and said
    python examples/benchmarks/quantise.py                            # hours of a core; interrupted, the same command goes on
    python examples/benchmarks/quantise.py --model emoji-sd --bits w4a8 --samples 4   # a look

Every way gets the same seeds and prompts, and is calibrated on others. PSNR is to the float picture of the same seed; *right*, pictures in
which the bundled judge sees what was asked for; *Frechet*, on the judge's features, to the float pictures of these seeds. Bytes are those
of the denoiser as the plan keeps it (codes, scales, and what stays in floats), as a share of float32; of other packages as its tensors lie
in memory. Ours are simulated: they say what a plan costs in quality, not in time.

Writes a JSON a row, quantise.md and quantise.png.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffgraft import Conflict, Unsupported
from diffgraft.installed import registry
from diffgraft.lab.held_out import HeldOut, decibels
from diffgraft.lab.judging import all_right, as_seen, load_judge
from diffgraft.lab.metrics import share
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.files import write_atomic
from diffgraft.methods.fitness import frechet
from diffgraft.methods.inputs import Pictures, make_pictures
from diffgraft.methods.quant.export import bytes_in
from diffgraft.methods.quant.knobs import FLOAT, bits_in
from diffgraft.methods.quant.layers import bytes_of, layers_of, quantised_in
from PIL import Image
from rich.console import Console
from torch import nn

STEPS = {"emoji-sd": 20, "emoji-flux": 12, "emoji-wan": 12, "emoji-dit": 20, "emoji-pixel": 20}
PLANS = ("w8a8", "w6a8", "w4a8", "w4a32")
OURS: dict[str, dict[str, Any]] = {
    "vidit_q": {"alpha": 0.3, "rotate": True},
    "q_diffusion": {"timesteps": 6, "iterations": 60, "scale_iterations": 30, "lr": 1e-2, "softmax": 8},
    "ptq4dm": {"draws": 8},
    "tfmq": {"iterations": 2000},
    "cachequant": {"interval": 1},
}
"""Knobs that are not the default; q_diffusion's and tfmq's are of a shorter calibration than the papers'."""
Made = tuple[list[Pictures], float, float]
"""(pictures, bytes as a share of float32, processor seconds that calibration took)."""
Convert = Callable[[nn.Module, Callable[[], None]], int]
"""Quantises a model in place, with a function that runs the pipeline on what is calibrated on -> bytes that its tensors do not show."""


def size_of(bench: HeldOut) -> int:
    return sum(bytes_in(model) for model in bench.denoisers.values())


def with_plugins(bench: HeldOut, plain: int, *plugins: Any, seconds: float = 0.0) -> Made:
    """Of plugins that quantise layers."""
    with bench.grafted(*plugins):
        kept, floats = bytes_of(list(quantised_in(bench.denoisers).values()))
        return bench.pictures(), (plain - floats + kept) / plain, seconds


def ours(bench: HeldOut, plain: int, name: str, plan: str) -> Made:
    """Of a plugin with a calibration of its own."""
    build = registry.find(name)
    artefact, seconds = bench.calibrated(build(bits=plan, **OURS[name]))
    return with_plugins(bench, plain, build(bits=plan, artefact=artefact, **OURS[name]), seconds=seconds)


def theirs(bench: HeldOut, plain: int, convert: Convert) -> Made:
    """Of another package, on copies of the denoisers."""
    old, started = dict(bench.denoisers), time.process_time()
    try:
        for name, model in old.items():
            setattr(bench.pipe, name, copy.deepcopy(model))
        teach = partial(taught, bench)
        saved = sum(convert(model, teach) for model in bench.denoisers.values())
        seconds = time.process_time() - started
        return bench.pictures(), (size_of(bench) - saved) / plain, seconds
    finally:
        for name, model in old.items():
            setattr(bench.pipe, name, model)


def taught(bench: HeldOut) -> None:
    """Run the pipeline on what is calibrated on."""
    for sample in bench.teaching:
        make_pictures(bench.pipe, [sample], bench.settings)


def by_torchao(plan: str) -> Convert:
    """Linear layers: weights of each channel, inputs of each token as they come."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        quantize_,
    )

    weights, inputs = bits_in(plan)
    few = {"weight_dtype": getattr(torch, f"int{weights}")}
    config: Any = Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    if inputs == FLOAT:
        config = IntxWeightOnlyConfig(granularity=PerAxis(0), **few)
    elif weights < 8:
        config = Int8DynamicActivationIntxWeightConfig(weight_granularity=PerAxis(0), **few)

    def convert(model: nn.Module, run: Any) -> int:
        quantize_(model, config, filter_fn=lambda module, path: type(module) is nn.Linear)
        return 0

    return convert


def by_quanto(plan: str) -> Convert:
    """Linear layers, convolutions and norms: what it does by default, inputs fixed by a calibration."""
    from optimum.quanto import Calibration, freeze, qint4, qint8, quantize

    weights, inputs = bits_in(plan)

    def convert(model: nn.Module, run: Any) -> int:
        quantize(model, weights={8: qint8, 4: qint4}[weights], activations=None if inputs == FLOAT else qint8)
        if inputs != FLOAT:
            with Calibration():
                run()
        freeze(model)
        return 0

    return convert


def by_bitsandbytes(_: str) -> Convert:
    """Linear layers in NF4. Its codes and scales, read here: what its version 0.50 itself reads from them on this CPU is
    something else (0.72 of the weights' norm away, where by hand it is 0.09)."""
    from bitsandbytes.functional import quantize_4bit

    def convert(model: nn.Module, run: Any) -> int:
        saved = 0
        for layer in list(layers_of({"model": model}, (nn.Linear,))):
            weight = layer.module.weight
            codes, state = quantize_4bit(weight.data, quant_type="nf4")
            places = torch.stack([codes.flatten() >> 4, codes.flatten() & 15], 1).flatten().long()
            values = state.code[places].view(len(state.absmax), -1) * state.absmax[:, None]
            saved += 4 * weight.numel() - codes.numel() - 4 * state.absmax.numel()
            weight.data = values.flatten()[: weight.numel()].view_as(weight)
        return saved

    return convert


PACKAGES: dict[str, tuple[str, Any, tuple[str, ...]]] = {
    "torchao": ("torchao", by_torchao, PLANS),
    "optimum-quanto": ("optimum", by_quanto, ("w8a8", "w4a8", "w4a32")),
    "bitsandbytes NF4": ("bitsandbytes", by_bitsandbytes, ("w4a32",)),
}


def ways(bench: HeldOut, plain: int, plan: str) -> Iterator[tuple[str, Callable[[], Made]]]:
    """What is measured at a plan of bits."""
    yield "nearest", lambda: with_plugins(bench, plain, Nearest(plan))
    yield "temporal_feature_cache + nearest", lambda: with_plugins(bench, plain, ("temporal_feature_cache", {}), Nearest(plan))
    for name in OURS:
        yield name, lambda name=name: ours(bench, plain, name, plan)  # type: ignore[misc]
    for name, (package, convert, plans) in PACKAGES.items():
        if plan in plans and find_spec(package) is not None:
            yield name, lambda convert=convert: theirs(bench, plain, convert(plan))  # type: ignore[misc]


class Quality:
    """The judge of a bundled pipeline on measured samples."""

    def __init__(self, bench: HeldOut, reference: list[Pictures]) -> None:
        self.judge: Any = load_judge(registry.find_bundled(bench.name))
        self.texts = [sample.wanted or "" for sample in bench.tested]
        self.reference = reference

    def figures(self, found: list[Pictures]) -> dict[str, Any]:
        figures = decibels(found, self.reference)
        if self.judge is not None and all(self.texts):
            images, plain = ([as_seen(each[0]) for each in pictures] for pictures in (found, self.reference))
            right = share(all_right(self.judge.score(images, self.texts)))
            features = getattr(self.judge, "features", None)
            figures["right"] = None if right is None else right.right
            figures["frechet"] = None if features is None else float(frechet(features(images), features(plain)))
        return figures


def measured(model: str, plans: list[str], samples: int, calibrate_on: int, only: str, out: Path, console: Console) -> None:
    """The rows of a model that are not there yet."""
    bench = HeldOut.load(model, STEPS[model], None, samples, calibrate_on)
    plain, reference = size_of(bench), bench.pictures()
    quality = Quality(bench, reference)
    rows = {f"{plan}/{way}": make for plan in plans for way, make in ways(bench, plain, plan) if only in way}
    save(out / model / "float.json", {**bench.facts, "figures": quality.figures(reference)}, reference)
    for key, make in rows.items():
        path = out / model / f"{key.replace('/', ' ')}.json"
        if path.exists() and json.loads(path.read_text())["samples"] == samples:
            continue
        started = time.perf_counter()
        try:
            pictures, size, seconds = make()
        except (Unsupported, Conflict) as error:
            save(path, {**bench.facts, "refused": f"{type(error).__name__}: {error}"}, None)
            console.print(f"{model} {key}: {type(error).__name__}: {str(error)[:120]}", highlight=False, markup=False, soft_wrap=True)
            continue
        row = {**bench.facts, "bytes": size, "calibrated_in": seconds, "figures": quality.figures(pictures)}
        save(path, row, pictures)
        console.print(f"{model} {key}: {row['figures']['mean']:.2f} dB, {time.perf_counter() - started:.0f} s", highlight=False)


def save(path: Path, row: Mapping[str, Any], pictures: list[Pictures] | None) -> None:
    """A row, and the first of its pictures beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pictures is not None:
        as_seen(pictures[0][0][:1]).save(path.with_suffix(".png"))
    write_atomic(path, (json.dumps(row, indent=1) + "\n").encode())


# the page -------------------------------------------------------------------------------------------------------------------------------


def page(out: Path) -> str:
    """All rows that are there as Markdown."""
    told = " ".join(str(__doc__).split("\n\n")[2].split())
    parts = [f"# Quantised denoisers\n\nMade by `python examples/benchmarks/quantise.py`. {told}"]
    for model in STEPS:
        rows = {path.stem: json.loads(path.read_text()) for path in sorted((out / model).glob("w*.json"))}
        if rows:
            parts.append(section(model, rows, json.loads((out / model / "float.json").read_text())))
    parts.append("![The first picture of each model: float, then each way at w4a8 in the tables' order](quantise.png)")
    return "\n\n".join(parts) + "\n"


def section(model: str, rows: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """The table of a model: a line a way, a column a plan."""
    names = sorted({key.partition(" ")[2] for key in rows}, key=[*["nearest", "temporal_feature_cache + nearest"], *OURS, *PACKAGES].index)
    plans = [plan for plan in PLANS if any(key.startswith(f"{plan} ") for key in rows)]
    right = plain["figures"].get("right")
    told = f"{plain['steps']} steps, {plain['samples']} pictures" + ("" if right is None else f"; float: {right} right")
    lines = [f"## {model}", "", f"{told}. PSNR in dB (worst), right, Frechet, bytes, minutes to calibrate.", ""]
    lines += ["| | " + " | ".join(plans) + " |", "|---" * (len(plans) + 1) + "|"]
    for name in names:
        found = [rows.get(f"{plan} {name}") for plan in plans]
        if any(each is not None and "refused" not in each for each in found):
            lines.append(f"| {name} | " + " | ".join(cell(each) for each in found) + " |")
    refused = dict.fromkeys(name for name in names for plan in plans if "refused" in (rows.get(f"{plan} {name}") or {}))
    return "\n".join([*lines, *([f"\nNot for this model: {', '.join(refused)}."] if refused else [])])


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None or "refused" in row:
        return ""
    found = row["figures"]
    parts = [f"**{found['mean']:.1f}** ({found['worst']:.1f})"]
    parts += [] if found.get("right") is None else [f"{found['right']}"]
    parts += [] if found.get("frechet") is None else [f"{found['frechet']:.2f}"]
    return ", ".join([*parts, f"{row['bytes']:.2f}x", f"{row['calibrated_in'] / 60:.1f}"])


def strip(out: Path, plan: str = "w4a8", side: int = 64) -> Image.Image | None:
    """The first picture of each model: float, and each way at one plan."""
    names = ["float", *(f"{plan} {name}" for name in ("nearest", *OURS, *PACKAGES))]
    rows = [[out / model / f"{name}.png" for name in names] for model in STEPS if (out / model / "float.png").exists()]
    if not rows:
        return None
    sheet = np.full((len(rows) * (side + 4), len(names) * (side + 4), 3), 255, dtype=np.uint8)
    for y, row in enumerate(rows):
        for x, path in enumerate(row):
            if path.exists():
                picture = np.asarray(Image.open(path).convert("RGB").resize((side, side), Image.Resampling.NEAREST))
                sheet[y * (side + 4) :, x * (side + 4) :][:side, :side] = picture
    return Image.fromarray(sheet)


def main(
    model: Annotated[list[str] | None, typer.Option(help=f"Repeat for several (default: all of {', '.join(STEPS)}).")] = None,
    bits: Annotated[list[str] | None, typer.Option(help=f"Plans; repeat for several (default: {', '.join(PLANS)}).")] = None,
    samples: Annotated[int, typer.Option(min=2, help="Pictures that are measured.")] = 12,
    calibrate_on: Annotated[int, typer.Option(min=1)] = 6,
    only: Annotated[str, typer.Option(help="Ways whose name has this in it.")] = "",
    out: Annotated[Path, typer.Option()] = Path("out/quantise"),
) -> None:
    """Error, quality and bytes of quantised denoisers."""
    torch.set_num_threads(1)
    console = Console()
    for name in model or STEPS:
        measured(name, bits or list(PLANS), samples, calibrate_on, only, out, console)
        (out / "quantise.md").write_text(page(out), encoding="utf-8")
        if (picture := strip(out)) is not None:
            picture.save(out / "quantise.png")
    console.print(f"wrote {out / 'quantise.md'}", highlight=False)


if __name__ == "__main__":
    with torch.no_grad():
        typer.run(main)
