"""A comparison for people: ``compare.png``, ``compare.json`` and two tables; of an interrupted one what there is."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path

from rich.table import Table

from diffgraft.lab.compare_picture import comparison_picture, is_measure, psnr_text, reference_name, seconds_text
from diffgraft.lab.results import ArmResult, Comparison, Unfinished
from diffgraft.lab.terminal import console, say
from diffgraft.methods.files import write_atomic


def write_comparison(result: Comparison, pipeline: str, out: Path) -> None:
    """``compare.png`` and ``compare.json``, each whole or not there."""
    buffer = io.BytesIO()
    comparison_picture(result, pipeline).save(buffer, "PNG")
    write_atomic(out / "compare.png", buffer.getvalue())
    write_json(result, pipeline, out)


def write_json(result: Comparison | Unfinished, pipeline: str, out: Path) -> None:
    """``compare.json``, with the command that made it."""
    raw = {"pipeline_name": pipeline, "command": shlex.join(["diffgraft", *sys.argv[1:]]), **result.to_json()}
    write_atomic(out / "compare.json", (json.dumps(raw, indent=1, default=str) + "\n").encode())


def keep_unfinished(result: Unfinished, pipeline: str, out: Path) -> None:
    """Write and say what an interrupted comparison has measured; a picture of an earlier one goes, as it is no picture of this."""
    write_json(result, pipeline, out)
    (out / "compare.png").unlink(missing_ok=True)
    rounds = f"{result.whole_rounds} of {result.settings.repeats} rounds are whole"
    say((f"unfinished: {result.error} during {result.during}; {rounds}", "yellow"), err=True)
    for part in result.arms:
        if part.latency is not None:
            facts = [seconds_text(part.latency.seconds.p50)]
            facts += [] if part.arm.kind == "baseline" else [f"{part.latency.of_medians:.2f}x"]
            facts += [f"PSNR {part.fidelity.psnr_mean:.1f}"] if part.fidelity and part.fidelity.psnr_mean is not None else []
            say(f"{part.arm.name}: {', '.join(facts)}", err=True)
    say((f"what was measured is in {out / 'compare.json'}, marked as unfinished", "yellow"), err=True)


def print_comparison(result: Comparison) -> None:
    """The result as two tables, and what must be known to read them."""
    out = console()
    out.print(speed_table(result))
    out.print()
    out.print(fidelity_table(result))
    out.print()
    say(f"fewer steps at equal time: {result.equal_time}.")
    if result.always:
        say(f"in every arm, the baseline included: {', '.join(result.always)}.")
    if result.advantage is not None:
        fewer = result.arms[-1].arm.name
        say(f"PSNR of {result.equal_time.matched_to} above that of {fewer}: {result.advantage.text('dB')}.")
        if not (equal := result.equal_time).held:
            unequal = f"{fewer} had {equal.realised:.2f} x the time of {equal.matched_to}, so this is not at equal time"
            say((f"{unequal}: compare again where nothing else runs", "yellow"))
    if result.product is not None:
        say(f"{result.product}.")
    idle = dict.fromkeys(name for item in result.arms for name in item.inactive)
    if idle:
        say((f"inactive, said to have done nothing here: {', '.join(idle)}. What their rows show is noise.", "yellow"))
    told: set[str] = set()
    for item in result.arms:
        if item.changed_nothing:
            say((f"{item.arm.name} changed nothing: every picture equals the baseline's bit for bit.", "yellow"))
        for note in item.notes:
            if note not in told:  # the stack's plugins say what they said alone
                told.add(note)
                say(note)
    for warning in result.warnings:
        say((warning, "yellow"))
    load = result.environment["load"]
    if load is not None and result.environment["load_after"][0] > (result.environment["cpus"] or 1) + 0.5:
        say(("this machine was busy with other work: the ratios were measured in turn and hold better than the seconds", "yellow"))


def speed_table(result: Comparison) -> Table:
    from rich.table import Table

    table = Table(title=f"speed ({result.pipeline}, rounds: {result.settings.repeats})", title_justify="left", header_style="bold")
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
            seconds_text(speed.seconds.q75 - speed.seconds.q25) if len(speed.rounds) > 1 else "-",
            speed_text(item),
            f"{speed.paired.p50:.2f}x"
            + (f" ({speed.paired.low:.2f}-{speed.paired.high:.2f})" if len(speed.rounds) > 1 else " (of one round)"),
            "-" if speed.denoise_of_medians is None else f"{speed.denoise_of_medians:.2f}x",
            f"{macs.per_run / 1e9:.3g}",
            f"{macs.limit:.2f}x",
        ]
        table.add_row(*cells, *([f"{(speed.peak_bytes or 0) / 2**20:.0f} MiB"] if has_memory else []))
    return table


def speed_text(item: ArmResult) -> str:
    """The ratio; where it is no gain, the reason comes first."""
    ratio = f"{item.latency.of_medians:.2f}x"
    if item.arm.kind == "baseline":
        return ratio
    return f"inactive ({ratio})" if item.is_idle else f"within noise ({ratio})" if item.latency.within_noise else ratio


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
            cells.append("-" if found is None else str(found))
        table.add_row(*cells)
    return table


def skipped_text(key: str, value: float, calls: float) -> str:
    """``deepcache 33 of 50 calls``; a counter of another name says so."""
    plugin, _, name = key.partition(": ")
    if name == "skipped":
        return f"{plugin} {value:g} of {calls:g} calls"
    return f"{plugin} {name} {value:g}"
