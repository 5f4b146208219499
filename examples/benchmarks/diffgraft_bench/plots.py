"""The plots of the report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from .rows import Row, way

mpl.use("agg")
SHAPES = {"plain": "s", "diffgraft": "o", "scheduler": "^", "cache": "D", "peer": "X", "bundled": "v", "fitted": "P"}
KINDS = {"plain": "the pipeline itself", "diffgraft": "diffgraft", "scheduler": "diffusers' schedulers", "cache": "diffusers' caches",
         "peer": "other packages", "bundled": "other models", "fitted": "fitted models"}  # fmt: skip


def png(figure: Figure) -> bytes:
    """A figure as a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def pareto(rows: Sequence[Row], value: str, title: str, axis: str) -> bytes:
    """Time (share of the plain pipeline's) against a figure: a line a method, a point a setting, whiskers from the slowest to the fastest
    round."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    plot = figure.subplots()
    shown = [row for row in rows if row.get(value) is not None]
    labels = sorted({(list(SHAPES).index(row["kind"]), row["label"], row["kind"]) for row in shown})
    colours = mpl.colormaps["tab20"].colors
    for number, (_, label, kind) in enumerate(labels):
        points = sorted((1 / row["speedup"], row[value], row) for row in shown if row["label"] == label and row["kind"] == kind)
        x, y = [point[0] for point in points], [point[1] for point in points]
        low = [x_ - 1 / row["speedup_high"] for x_, _, row in points]
        high = [1 / row["speedup_low"] - x_ for x_, _, row in points]
        plain = kind == "plain"
        style = {"color": "black" if plain else colours[number % len(colours)], "marker": SHAPES[kind], "markersize": 6}
        line = "-" if plain else "--" if kind != "diffgraft" else "-"
        plot.errorbar(x, y, xerr=[low, high], linestyle=line, linewidth=2 if plain else 1, elinewidth=0.5, label=label, **style)
    plot.set(xscale="log", xlabel="time of a call, share of the plain pipeline's", ylabel=axis, title=title)
    for ticks in (plot.xaxis.set_major_formatter, plot.xaxis.set_minor_formatter):
        ticks("{x:.2g}")
    plot.tick_params(axis="x", which="minor", labelsize=7, rotation=60)
    plot.grid(alpha=0.3, which="both")
    plot.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return png(figure)


def bars(rows: Sequence[Row], title: str) -> bytes:
    """Speed-up of each method beside its MAC limit."""
    figure = Figure(figsize=(9, 0.45 * len(rows) + 1.2), layout="constrained")
    plot = figure.subplots()
    ordered = sorted(rows, key=lambda row: (row["pipeline"], row["speedup"]))
    names = [f"{row['pipeline']}: {row['label']} ({', '.join(filter(None, (row['setting'], way(row))))})" for row in ordered]
    values = [row["speedup"] for row in ordered]
    spread = [[row["speedup"] - row["speedup_low"] for row in ordered], [row["speedup_high"] - row["speedup"] for row in ordered]]
    colours = ["tab:blue" if row["kind"] == "diffgraft" else "tab:gray" for row in ordered]
    plot.barh(names, values, xerr=spread, color=colours, error_kw={"linewidth": 0.8})
    plot.scatter([row["mac_limit"] for row in ordered], names, marker="|", s=200, color="red", zorder=3, label="MAC limit")
    plot.axvline(1, color="black", linewidth=0.8)
    plot.set(xlabel="times as fast as the plain pipeline", title=title)
    plot.tick_params(axis="y", labelsize=8)
    plot.legend(loc="lower right", fontsize=8)
    return png(figure)


def by_layout(rows: Sequence[Row], title: str) -> bytes:
    """A panel a layout, a bar a method: times as fast as the plain pipeline of the same kind (compiled ones are hatched)."""
    speed = [row for row in rows if row["arm"] == "speed" and not row["error"]]
    layouts = list(dict.fromkeys(row["pipeline"] for row in speed))
    ordered = sorted(speed, key=lambda row: (row["compile"], row["speedup"]))
    panels = {name: [row for row in ordered if row["pipeline"] == name] for name in layouts}
    heights = [len(panel) + 1.5 for panel in panels.values()]
    figure = Figure(figsize=(10, 0.28 * sum(heights) + 1), layout="constrained")
    axes = figure.subplots(len(layouts), squeeze=False, height_ratios=heights)[:, 0]
    colours = {"diffgraft": "tab:blue", "cache": "tab:orange", "peer": "tab:gray"}
    for plot, (name, panel) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(panel):
            spread = [[row["speedup"] - row["speedup_low"]], [row["speedup_high"] - row["speedup"]]]
            style = {"color": colours[row["kind"]], "hatch": "//" if row["compile"] else None, "edgecolor": "white"}
            plot.barh(place, row["speedup"], xerr=spread, error_kw={"linewidth": 0.8}, **style)
            facts = [f"{row['speedup']:.2f}x", f"{row['working_bytes'] / 2**30:.2f} GiB" if row.get("working_bytes") else ""]
            facts += [f"{row['syncs_per_step']:.1f} waits a step" if row.get("syncs_per_step") is not None else ""]
            plot.text(row["speedup_high"], place, "  " + ", ".join(filter(None, facts)), va="center", fontsize=7)
        plain = {row["compile"]: row for row in panel}
        times = [f"{min(row['plain_seconds']):.2f} s {'compiled' if compiled else 'eager'}" for compiled, row in plain.items()]
        names = [f"{row['label']} ({', '.join(filter(None, (row['setting'], way(row))))})" for row in panel]
        plot.set_yticks(range(len(panel)), names, fontsize=7)
        plot.set_xlim(0, 1.35 * max(row["speedup_high"] for row in panel))
        plot.axvline(1, color="black", linewidth=0.8)
        plot.set_title(f"{name}, {panel[0]['steps']} steps; plain pipeline {', '.join(times)}", fontsize=9)
    figure.suptitle(f"{title}: blue diffgraft, orange diffusers, grey other packages; hatched: compiled", fontsize=10)
    figure.supxlabel("times as fast as the plain pipeline", fontsize=9)
    return png(figure)
