"""A comparison for people: the picture grid, ``compare.json`` and two tables."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from diffgraft.lab.pictures import draw_grid, strip, to_images
from diffgraft.lab.results import ArmResult, Comparison
from diffgraft.lab.terminal import console
from diffgraft.methods.files import write_atomic

GRID_COLUMNS = 6
VIDEO_COLUMNS = 2


def write_comparison(result: Comparison, pipeline: str, out: Path) -> None:
    """``compare.png`` and ``compare.json``, each whole or not there."""
    buffer = io.BytesIO()
    comparison_grid(result, pipeline).save(buffer, "PNG")
    raw = {"pipeline_name": pipeline, "command": shlex.join(["diffgraft", *sys.argv[1:]]), **result.to_json()}
    write_atomic(out / "compare.png", buffer.getvalue())
    write_atomic(out / "compare.json", (json.dumps(raw, indent=1, default=str) + "\n").encode())


def comparison_grid(result: Comparison, pipeline: str) -> Any:
    """The labelled picture grid: a row an arm, a column a prompt; of a video a strip of frames."""
    video = result.arms[0].pictures.shape[1] > 1
    samples = result.settings.samples[: VIDEO_COLUMNS if video else GRID_COLUMNS]
    labelled = [(grid_label(item, result), item.pictures) for item in result.arms]
    if result.reference is not None:
        labelled.append(([reference_name(result)], result.reference))
    rows = [(label, [strip(to_images(frames)) for frames in pictures[: len(samples)]]) for label, pictures in labelled]
    machine, number = result.environment, len(result.settings.samples)
    footer = (
        f"{machine.get('device_name') or machine['processor']}, {machine['dtype'].removeprefix('torch.')}, one picture a call, p50 of "
        f"{result.settings.repeats} interleaved rounds. PSNR to the {reference_name(result)}: mean (worst) of {number} pictures. "
        f"Fewer steps at equal time: {result.equal_time}."
        + (f" In every arm: {', '.join(result.always)}." if result.always else "")
    )
    captions = [f"{sample.label} (seed {sample.seed})" for sample in samples]
    side = 480 if video else 192
    return draw_grid(f"{pipeline}: plugins against the plain pipeline", footer, captions, rows, side)


def reference_name(result: Comparison) -> str:
    """What the fidelity figures are held against."""
    steps = result.settings.reference_steps
    return "baseline" if steps is None else f"baseline with {steps} steps"


def is_measure(item: ArmResult, result: Comparison) -> bool:
    """Whether the arm is itself what fidelity is held against."""
    return item.arm.kind == "baseline" and result.reference is None


def grid_label(item: ArmResult, result: Comparison) -> list[str]:
    """The lines beside a row of the grid."""
    seconds = item.latency.seconds.p50
    lines = [item.arm.name, f"{item.arm.steps} steps, {seconds_text(seconds)}"]
    if item.arm.kind != "baseline":
        lines.append(faster_text(item))
    if not is_measure(item, result):
        lines.append("changed nothing" if item.changed_nothing else f"PSNR {psnr_text(item)}")
    if item.verdicts is not None and (everything := item.verdicts.shares.get("all")) is not None:
        lines.append(f"as prompted {everything.right}/{everything.total}")
    return lines


def faster_text(item: ArmResult) -> str:
    """``2.61x faster``; nothing of the kind when some rounds say faster and some slower."""
    ratio, paired = item.latency.of_medians, item.latency.paired
    if paired.low <= 1 <= paired.high:
        return f"as fast, within noise ({ratio:.2f}x)"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


def print_comparison(result: Comparison) -> None:
    """The result as two tables, and what must be known to read them."""
    out = console()
    out.print(speed_table(result))
    out.print()
    out.print(fidelity_table(result))
    out.print()
    typer.echo(f"fewer steps at equal time: {result.equal_time}.")
    if result.always:
        typer.echo(f"in every arm, the baseline included: {', '.join(result.always)}.")
    if result.advantage is not None:
        fewer = result.arms[-1].arm.name
        typer.echo(f"PSNR of {result.equal_time.matched_to} above that of {fewer}: {result.advantage} dB (95 % interval).")
    if result.product is not None:
        typer.echo(f"{result.product}.")
    told: set[str] = set()
    for item in result.arms:
        if item.changed_nothing:
            typer.secho(f"{item.arm.name} changed nothing: every picture equals the baseline's bit for bit.", fg="yellow")
        for note in item.notes:
            if note not in told:  # the stack's plugins say what they said alone
                told.add(note)
                typer.echo(note)
    for warning in result.warnings:
        typer.secho(warning, fg="yellow")
    load = result.environment["load"]
    if load is not None and result.environment["load_after"][0] > (result.environment["cpus"] or 1) + 0.5:
        typer.secho("this machine was busy with other work: the ratios were measured in turn and hold better than the seconds", fg="yellow")


def speed_table(result: Comparison) -> Table:
    from rich.table import Table

    table = Table(title=f"speed ({result.pipeline}, {result.settings.repeats} rounds)", title_justify="left", header_style="bold")
    has_memory = any(item.latency.peak_bytes is not None for item in result.arms)
    for column in (
        "arm",
        "steps",
        "p50",
        "IQR",
        "speed-up",
        "paired p50 (range)",
        "denoise",
        "GMAC",
        "MAC limit",
        *(["peak"] if has_memory else []),
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for item in result.arms:
        speed, macs = item.latency, item.macs
        cells = [
            item.arm.name,
            str(item.arm.steps),
            seconds_text(speed.seconds.p50),
            seconds_text(speed.seconds.q75 - speed.seconds.q25),
            f"{speed.of_medians:.2f}x",
            f"{speed.paired.p50:.2f}x ({speed.paired.low:.2f}-{speed.paired.high:.2f})",
            "-" if speed.denoise_of_medians is None else f"{speed.denoise_of_medians:.2f}x",
            f"{macs.per_run / 1e9:.3g}",
            f"{macs.limit:.2f}x",
        ]
        table.add_row(*cells, *([f"{(speed.peak_bytes or 0) / 2**20:.0f} MiB"] if has_memory else []))
    return table


def fidelity_table(result: Comparison) -> Table:
    from rich.table import Table

    judged = [item.verdicts for item in result.arms if item.verdicts is not None]
    fields = list(judged[0].shares) if judged else []
    number = len(result.settings.samples)
    table = Table(
        title=f"fidelity to the {reference_name(result)} ({number} pictures), what was skipped, and the judge (95 % Wilson)",
        title_justify="left",
        header_style="bold",
    )
    for column in ("arm", "PSNR dB mean (worst)", "SSIM mean (worst)", "skipped", *fields):
        table.add_column(column, justify="left" if column in ("arm", "skipped") else "right")
    for item in result.arms:
        near = item.fidelity
        ssim = "-" if near.ssim_mean is None or near.ssim_worst is None else f"{near.ssim_mean:.3f} ({near.ssim_worst:.3f})"
        skipped = ", ".join(skipped_text(key, value, item.denoiser_calls) for key, value in item.skipped.items())
        measure = is_measure(item, result)
        cells = [item.arm.name, "-" if measure else psnr_text(item), "-" if measure else ssim, skipped or "-"]
        for name in fields:
            found = item.verdicts.shares.get(name) if item.verdicts else None
            cells.append("-" if found is None else f"{found.right}/{found.total} ({100 * found.low:.0f}-{100 * found.high:.0f} %)")
        table.add_row(*cells)
    return table


def skipped_text(key: str, value: float, calls: float) -> str:
    """``deepcache 33 of 50 calls``; a counter of another name says so."""
    plugin, _, name = key.partition(": ")
    if name == "skipped":
        return f"{plugin} {value:g} of {calls:g} calls"
    return f"{plugin} {name} {value:g}"


def psnr_text(item: ArmResult) -> str:
    """``44.1 (39.0)``, with the number of pictures that equal the baseline's."""
    near = item.fidelity
    if near.psnr_mean is None or near.psnr_worst is None:
        return "changed nothing" if item.changed_nothing else "identical"
    equal = f", {near.identical} identical" if near.identical else ""
    return f"{near.psnr_mean:.1f} ({near.psnr_worst:.1f}){equal}"


def seconds_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"
