"""The results in the benchmark's README: written from the rows, which are kept beside it so that every number can be looked up."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

from diffgraft.methods.files import write_atomic

from . import findings
from .models import ROOT
from .report import number, pipelines
from .rows import Row, Store

BEGIN, END = "<!-- bench:begin (made by `python -m diffgraft_bench readme`) -->\n", "<!-- bench:end -->"
FIDELITY = "psnr_reference_mean"
PLOT = "emoji-sd-psnr_reference_mean.png"
HERE = ROOT / "examples" / "benchmarks"


def write_readme(store: Store, out: Path) -> Path:
    """Put plot, tables and raw rows beside each other."""
    rows = list(store)
    shutil.copyfile(out / PLOT, HERE / "against.png")
    store.write_csv(HERE / "rows.csv")
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    write_atomic(readme, (before + BEGIN + body(rows) + END + after).encode())
    return readme


def body(rows: Sequence[Row]) -> str:
    """Everything between the marks."""
    good = findings.measured(rows)
    first = good[0]
    parts = [
        "![emoji-sd: time against solver error](against.png)\n",
        "The methods that no other one beats in both time and nearness to the plain pipeline's many-step pictures, on each bundled\n"
        "checkpoint (speed-up against the plain pipeline with its own steps, in turn; least and most of the rounds in brackets):\n",
        "<details><summary>All of them</summary>\n",
        "| pipeline | method | setting | speed-up | PSNR dB | as prompted |",
        "|---|---|---|---|---|---|",
    ]
    for name in pipelines(good, "quality"):
        here = [row for row in good if row["pipeline"] == name and row["arm"] == "quality"]
        for row in findings.front(here, FIDELITY):
            label = f"**{row['label']}**" if row["kind"] == findings.OURS else row["label"]
            parts.append(f"| {name} | {label} | {row['setting']} | {speed(row)} | {row[FIDELITY]:.1f} | {row['right']}/{row['judged']} |")
    parts += ["\n</details>\n", *goal(rows, good), ""]
    found = findings.duels(rows)
    if found:
        parts += [
            "The same method at the same setting, our plugin and the other implementation, in one process:\n",
            "| method | pipeline | setting | ours | theirs | time of ours / theirs | memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for duel in found:
            ours, theirs = duel.ours, duel.theirs
            parts.append(
                f"| {ours['label']} and {theirs['label']} | {ours['pipeline']} | {ours['setting']} | {ours['speedup']:.2f}x "
                f"| {theirs['speedup']:.2f}x | {duel.ratio:.2f} ({duel.low:.2f}-{duel.high:.2f}) | {number(duel.memory)} |"
            )
        parts.append("")
    failed = sorted({(row["label"], row["pipeline"], row["error"]) for row in rows if row["error"]})
    if failed:
        parts += ["Did not run here:\n", *(f"- {label} on {name}: `{error[:230]}`" for label, name, error in failed), ""]
    commands = " and ".join(f"`{command}`" for command in sorted({row["command"] for row in rows}))
    versions = first["versions"]
    parts.append(
        f"{commands} on {first['machine'].get('device_name') or first['machine']['processor']}, {first['machine']['cpus']} cores, torch "
        f"{versions['torch']}, diffusers {versions['diffusers']}; {first['samples']} pictures, {first['rounds']} rounds, many steps: "
        f"{first['reference_steps']}. Raw rows: [rows.csv](rows.csv). With pictures: report.html beside the rows; "
        "`bash examples/benchmarks/run.sh --quick` makes a shorter one, out/benchmarks/report.html, in 18 minutes.\n"
    )
    return "\n".join(parts)


def speed(row: Row) -> str:
    return f"{row['speedup']:.2f}x ({row['speedup_low']:.2f}-{row['speedup_high']:.2f})"


def goal(rows: Sequence[Row], good: Sequence[Row]) -> list[str]:
    """At the points that others reach: how ours compare."""
    others = "diffusers' schedulers and caches, other packages, fewer steps"
    lines = [f"At each point that others reach ({others}), our fastest that is as near, and how many times as fast:\n"]
    for name in pipelines(good, "quality"):
        ratios = [(each.other, each.ours, each.ratio) for each in findings.against_others(rows, name, FIDELITY)]
        told = [f"{other['label']} ({other['setting']}) {'none' if math.isnan(ratio) else f'{ratio:.2f}x'}" for other, _, ratio in ratios]
        lines.append(f"- {name}: {'; '.join(told)}")
    lines.append("\nThe fastest that the judge finds right as often as the plain pipeline:\n")
    for name in pipelines(good, "quality"):
        best = findings.as_prompted(rows, name)
        if best is not None:
            other, mine = best.other, best.ours
            ours = f"of ours {mine['label']} ({mine['setting']}) {mine['speedup']:.2f}x: {best.ratio:.2f}x" if mine else "none of ours"
            lines.append(f"- {name}: {other['label']} ({other['setting']}) {other['speedup']:.2f}x, {ours}")
    return lines
