"""The page: plots, tables, pictures and failures, in one file that needs nothing else; and the table and plot of the README."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffgraft.methods.files import write_atomic
from jinja2 import Environment, FileSystemLoader, select_autoescape

from . import findings, plots
from .rows import CIRCUMSTANCES, Row, Store, way

QUALITY = (
    ("psnr_mean", "PSNR to the plain pipeline's pictures, dB", "nearness to the uncached pictures"),
    ("psnr_reference_mean", "PSNR to the many-step pictures, dB", "solver error"),
    ("lpips_mean", "LPIPS to the plain pipeline's pictures", "nearness to the uncached pictures"),
    ("likelihood", "judge: log-likelihood of the prompt (0 is sure)", "prompt-following"),
    ("right", "judge: pictures as prompted", "prompt-following"),
)
"""Columns that are plotted against time; of the judge's two the first that a pipeline has."""


def write_report(store: Store, out: Path) -> Path:
    """rows.csv, the plots as PNG, and report.html."""
    rows = list(store)
    store.write_csv(out / "rows.csv")
    good = findings.measured(rows)
    sections = [section(name, [row for row in good if row["pipeline"] == name], rows, out) for name in pipelines(good, "quality")]
    fast = sorted((row for row in good if row["arm"] == "speed"), key=lambda row: (row["pipeline"], -row["speedup"]))
    speed_plot = keep(out, "speed", plots.bars(fast, "real layouts, random weights")) if fast else ""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]))
    environment.filters |= {"number": number, "time": seconds, "mib": mebibytes, "way": way}
    page = environment.get_template("report.html").render(
        sections=sections,
        speed=fast,
        speed_plot=speed_plot,
        duels=findings.duels(rows),
        failures=[row for row in rows if row["error"]],
        commands=sorted({row["command"] for row in rows}),
        machines=unique(good, "machine"),
        versions=unique(good, "versions"),
        circumstances=unique(good, "arm", *CIRCUMSTANCES),
        equal_db=findings.EQUAL_DB,
    )
    write_atomic(out / "report.html", page.encode())
    return out / "report.html"


def pipelines(rows: Sequence[Row], arm: str) -> list[str]:
    """Names in a fixed order."""
    return sorted({row["pipeline"] for row in rows if row["arm"] == arm})


def section(name: str, rows: Sequence[Row], everything: Sequence[Row], out: Path) -> dict[str, Any]:
    """What the page shows of one bundled pipeline."""
    shown = [(value, axis, what) for value, axis, what in QUALITY if any(row.get(value) is not None for row in rows)]
    if any(value == "likelihood" for value, *_ in shown):
        shown = [each for each in shown if each[0] != "right"]
    images = [keep(out, f"{name}-{value}", plots.pareto(rows, value, f"{name}: {what}", axis)) for value, axis, what in shown]
    ordered = sorted(rows, key=lambda row: (row["kind"] != "plain", row["kind"] != "diffgraft", row["label"], -row["speedup"]))
    return {
        "name": name,
        "plots": images,
        "rows": ordered,
        "strips": {row["key"]: data_url((out / "pictures" / f"{row['key']}.png").read_bytes()) for row in rows},
        "faster": {fidelity: findings.against_others(everything, name, fidelity) for fidelity in ("psnr_mean", "psnr_reference_mean")},
        "as_prompted": findings.as_prompted(everything, name),
        "solvers": findings.solver_errors(everything, name),
    }


def keep(out: Path, name: str, content: bytes) -> str:
    """Write a plot beside the page, and give it as what the page holds."""
    write_atomic(out / f"{name}.png", content)
    return data_url(content)


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def unique(rows: Sequence[Row], *names: str) -> list[Any]:
    """The different values of some columns."""
    found: dict[str, Any] = {}
    for row in rows:
        value = row[names[0]] if len(names) == 1 else {name: row[name] for name in names}
        if len(names) == 1 and isinstance(value, dict):
            value = {key: item for key, item in value.items() if key != "load"}
        found.setdefault(repr(value), value)
    return list(found.values())


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.0f} ms"
