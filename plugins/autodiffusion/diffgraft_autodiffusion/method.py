"""The search space of AutoDiffusion and how it is walked, without diffusers. Symbols as in arXiv 2309.10438.

A candidate is a sequence of K time steps out of the N of the training, and for each of them the layers of the network that are left out.
The network has L layers; what a candidate may execute over all its steps is bounded by N_max. It is kept as a plain JSON value:

    {"timesteps": [t_1 > t_2 > ... > t_K], "end": t_{K+1} < t_K or None, "skips": [[layer, ...] of step 1, ..., of step K]}

``end`` is the level at which the last step stops; None leaves it to the scheduler (the clean sample).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Candidate = dict[str, Any]
"""A genome."""


@dataclass(frozen=True)
class Space:
    """Where candidates come from.

    start   the uniform schedule, falling: what the scheduler makes by itself
    points  time steps that may be drawn: 0 ... N - 1, or 1 ... N for flow models (their t / N is the noise level)
    layers  the L names that may be left out
    budget  N_max: layers executed over all steps (K L: as many as the start does)
    end     whether the level at which the last step stops is searched too
    """

    start: tuple[float, ...]
    points: range
    layers: tuple[str, ...] = ()
    budget: int = 0
    end: bool = False


def uniform(space: Space) -> Candidate:
    """The start: the scheduler's own time steps, every layer."""
    return candidate([*space.start, *([space.points[0]] if space.end else [])], [[] for _ in space.start], space)


def candidate(points: Sequence[float], skips: Sequence[Sequence[str]], space: Space) -> Candidate:
    """A genome of K (+ 1) points in any order; a step's list stays with its time step, an ``end`` has none."""
    points = [int(t) if t == int(t) else t for t in points]
    end = min(points) if space.end else None
    steps = [t for t in points if t != end] if space.end else points
    paired = sorted(zip(steps, skips, strict=True), key=lambda pair: -pair[0])
    order = {name: i for i, name in enumerate(space.layers)}
    return {"timesteps": [t for t, _ in paired], "end": end, "skips": [sorted(names, key=order.__getitem__) for _, names in paired]}


def points_of(genome: Candidate) -> list[float]:
    """All K (+ 1) points."""
    return [*genome["timesteps"], *([] if genome["end"] is None else [genome["end"]])]


def executed(genome: Candidate, space: Space) -> int:
    """Layers that a candidate executes over all its steps: at most N_max."""
    return sum(len(space.layers) - len(names) for names in genome["skips"])


def falls(timesteps: Sequence[float]) -> bool:
    """Whether the time steps are strictly falling."""
    return all(a > b for a, b in pairwise(timesteps))


def fits(genome: Candidate, space: Space) -> bool:
    """Whether a candidate is one: distinct time steps, within N_max."""
    return falls(points_of(genome)) and (not space.layers or executed(genome, space) <= space.budget)


def skip_ratio(epoch: int, ratio: float, begin: int = 4, rise: int = 5) -> float:
    """The largest share of layers that a step may leave out, for candidates drawn after generation ``epoch`` (the first is 0).

    0 up to ``begin``, so that the time steps settle first; then it rises by ratio / ``rise`` a generation up to ``ratio``.
    """
    return ratio * min(1.0, max(0, epoch - begin) / rise)


def drawn(rng: random.Random, space: Space, ratio: float) -> Candidate | None:
    """A random candidate: steps with random skip lists of up to ``ratio`` L layers, until N_max is used up; then random time steps."""
    L = len(space.layers)
    most = int(ratio * L)
    skips: list[list[str]] = [] if L else [[] for _ in space.start]
    used = 0
    while L and used + L - most <= space.budget:
        skips.append(rng.sample(space.layers, rng.randint(max(0, used + L - space.budget), most)))
        used += L - len(skips[-1])
    K = len(skips)
    if K == 0 or K + space.end > len(space.points):
        return None
    return candidate(rng.sample(space.points, K + space.end), skips, space)


def mutated(rng: random.Random, genome: Candidate, space: Space, p: float, ratio: float, radius: int | None = None) -> Candidate | None:
    """Every time step is replaced by a new one with probability ``p``, and so is every entry of a skip list.

    Once layers may be left out (ratio > 0), an empty list becomes a random one with probability ``p``. The new time step is any of the N,
    or (not the paper's) one at most ``radius`` training timesteps away.
    """
    L = len(space.layers)
    points = points_of(genome)
    for i in range(len(points)):
        if rng.random() < p:
            free = rng.choice(space.points if radius is None else around(points[i], radius, space))
            if free in points:
                return None  # drawn anew by the caller: cheaper than a list of all free ones
            points[i] = free
    skips = [list(names) for names in genome["skips"]]
    if ratio > 0:
        for names in skips:
            if not names and rng.random() < p:
                names += rng.sample(space.layers, rng.randint(0, int(ratio * L)))
            elif names:
                for j in range(len(names)):
                    others = [name for name in space.layers if name not in names]
                    if others and rng.random() < p:
                        names[j] = rng.choice(others)
    if space.end:  # the end keeps no list: of the points, the smallest is the end
        points, skips = _end_last(points, skips)
    changed = candidate(points, skips, space)
    return changed if fits(changed, space) else None


def around(t: float, radius: int, space: Space) -> range:
    """Points at most ``radius`` away from ``t``, which may lie between two of them."""
    first, last = space.points[0], space.points[-1]
    return range(max(first, math.ceil(t - radius)), min(last, math.floor(t + radius)) + 1)


def _end_last(points: list[float], skips: list[list[str]]) -> tuple[list[float], list[list[str]]]:
    """Points and lists when another point has become the smallest: the old end takes over the list of the step that ends now."""
    last = min(range(len(points)), key=points.__getitem__)
    end = len(points) - 1
    if last != end:
        points[last], points[end] = points[end], points[last]
    return points, skips


def crossed(rng: random.Random, one: Candidate, other: Candidate, space: Space) -> Candidate | None:
    """Each step, with its skip list, comes from one of two candidates by the toss of a coin; what the longer one has more is kept."""
    pairs = [list(zip(parent["timesteps"], parent["skips"], strict=True)) for parent in (one, other)]
    short, long = sorted(pairs, key=len)
    steps = [rng.choice(both) for both in zip(*pairs, strict=False)] + long[len(short) :]
    points = [t for t, _ in steps] + ([rng.choice((one, other))["end"]] if space.end else [])
    if len(set(points)) < len(points) or (space.end and min(points) != points[-1]):
        return None
    child = candidate(points, [names for _, names in steps], space)
    return child if fits(child, space) else None


# published schedules -------------------------------------------------------------------------------------------------------------------

PRESETS: dict[str, tuple[tuple[float, ...], float | None]] = {
    # continuous t in (0, 1] of DPM-Solver: the discrete index is 1000 t - 1; the fifth point is where the fourth step ends
    "sd14_dpm_4": ((925.1, 717.3, 499.5, 284.7), 14.0),
    "adm64_6": ((944, 834, 574, 354, 217, 94), None),
    "adm64_10": ((971, 856, 744, 676, 647, 572, 441, 305, 137, 85), None),
}
"""Time steps found by the authors (time steps, end): not verified here, there are no weights at hand."""
