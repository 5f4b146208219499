"""What the rows say about the goals: pure functions of rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .rows import Row

EQUAL_DB = 0.5
"""PSNR within which two rows count as equally near."""
OURS = "diffgraft"


def measured(rows: Iterable[Row]) -> list[Row]:
    """Rows that did not fail."""
    return [row for row in rows if not row["error"]]


@dataclass(frozen=True)
class Faster:
    """At a point that others reach: our fastest row that is as near, and how many times faster it is."""

    pipeline: str
    other: Row
    ours: Row | None
    ratio: float


def front(rows: Sequence[Row], fidelity: str) -> list[Row]:
    """Rows faster than the plain pipeline that no other one beats in both time and fidelity, fastest first."""
    best, kept = -math.inf, []
    for row in sorted(rows, key=lambda row: -row["speedup"]):
        if row["speedup"] > 1 and row[fidelity] is not None and row[fidelity] > best:
            best = row[fidelity]
            kept.append(row)
    return kept


def against_others(rows: Sequence[Row], pipeline: str, fidelity: str) -> list[Faster]:
    """On the front of everything that is not ours: what ours reach at a fidelity of no more than 0.5 dB less."""
    here = [row for row in measured(rows) if row["arm"] == "quality" and row["pipeline"] == pipeline]
    mine = [row for row in here if row["kind"] == OURS and row[fidelity] is not None]
    found = []
    for other in front([row for row in here if row["kind"] != OURS], fidelity):
        near = [row for row in mine if row[fidelity] >= other[fidelity] - EQUAL_DB]
        best = max(near, key=lambda row: row["speedup"], default=None)
        found.append(Faster(pipeline, other, best, best["speedup"] / other["speedup"] if best else math.nan))
    return found


def as_prompted(rows: Sequence[Row], pipeline: str) -> Faster | None:
    """The fastest of everything that is not ours, and of ours, that the judge finds right as often as the plain pipeline.

    None where there is no judge, or nothing that is not ours gets there.
    """
    here = [row for row in measured(rows) if row["arm"] == "quality" and row["pipeline"] == pipeline and row.get("judged")]
    level = [row for row in here if row["right"] >= row["plain_right"] and row["speedup"] > 1]
    best = {mine: max((row for row in level if (row["kind"] == OURS) is mine), key=lambda row: row["speedup"], default=None)
            for mine in (True, False)}  # fmt: skip
    if best[False] is None:
        return None
    ratio = best[True]["speedup"] / best[False]["speedup"] if best[True] else math.nan
    return Faster(pipeline, best[False], best[True], ratio)


@dataclass(frozen=True)
class Duel:
    """Our plugin and the other implementation of the same method at the same setting.

    ``ratio`` seconds of ours / seconds of theirs, median over the rounds in which both ran; ``low`` and ``high`` its extremes.
    """

    ours: Row
    theirs: Row
    ratio: float
    low: float
    high: float

    @property
    def memory(self) -> float:
        """Peak bytes of ours / of theirs; NaN where they were not counted."""
        mine, other = self.ours["peak_bytes"], self.theirs["peak_bytes"]
        return mine / other if mine and other else math.nan


def duels(rows: Sequence[Row]) -> list[Duel]:
    """All pairs that ran in one process."""
    good = measured(rows)
    found = []
    for theirs in good:
        for ours in good:
            same = all(ours[key] == theirs[key] for key in ("session", "pipeline", "arm", "steps", "setting"))
            if same and ours["kind"] == OURS and ours["label"] == theirs["ours"]:
                ratios = [a / b for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
                found.append(Duel(ours, theirs, statistics.median(ratios), min(ratios), max(ratios)))
    return found


SOLVERS = ("dpm_solver_v3", "autodiffusion", "autodiffusion over UniPC")
"""Ours alone: a stack with a cache or a smaller model has other errors too."""


def solver_errors(rows: Sequence[Row], pipeline: str, most: int = 10) -> dict[int, list[Row]]:
    """By number of steps: schedulers and solvers, the nearest to the many-step pictures first."""
    here = [row for row in measured(rows) if row["arm"] == "quality" and row["pipeline"] == pipeline and row["steps"] <= most]
    solvers = [row for row in here if row["kind"] in ("scheduler", "plain") or row["label"] in SOLVERS]
    by_steps: dict[int, list[Row]] = {}
    for row in sorted(solvers, key=lambda row: -(row["psnr_reference_mean"] or 0)):
        by_steps.setdefault(row["steps"], []).append(row)
    return dict(sorted(by_steps.items()))
