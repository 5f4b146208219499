"""What a tuning is asked for, what it measures, and what it finds (see `diffgraft.lab.tune`)."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from diffgraft.installed.errors import ConfigError
from diffgraft.lab.metrics import Mean, Spread
from diffgraft.lab.results import plain
from diffgraft.methods.inputs import CallSettings, Sample

MOST_DB = 100.0
"""PSNR of equal pictures, which is infinite, counts as this in means; 8-bit files of equal look differ by about 59 dB."""
SCHEMA = 1
"""Number of the layout of ``tune.json``."""
RUNGS = 8
"""Numbers of steps that are tried, from the pipeline's own down, two a halving: 50, 35, 25, 18, 12, 9, 6, 4."""

METHOD = {
    "ratio": "median over the rounds of seconds of the candidate / seconds of the plain pipeline with its default steps, both whole "
    "pipe(...) calls with one sample, the same prompt and seed, right after each other",
    "fidelity": "mean over the pictures of PSNR (dB, at most 100) or SSIM to the plain pipeline's pictures with `reference_steps` (or its "
    "default) steps, or share that the bundled judge finds right in everything",
    "front": "trials that no other trial beats in both",
    "finals": "other prompts and seeds; rounds of every side in turn; intervals are 95 % (bootstrap over pictures; Wilson of the judge)",
    "fewer_steps": "the plain pipeline with the smallest number of steps that reaches the target, found by bisection on the very pictures "
    "that it is judged on: the benefit of the doubt is with it",
    "faster": "every round says so (true), every round says slower (false), or neither (null)",
}


@dataclass(frozen=True)
class Goal:
    """``value`` of a measure that is to be reached: "psnr" in dB, "ssim" 0 to 1, "judge" the share of right pictures 0 to 1."""

    measure: Literal["psnr", "ssim", "judge"]
    value: float

    @classmethod
    def parse(cls, text: str) -> Goal:
        """``psnr=30``.

        Raises:
            ConfigError: another measure, or a value that cannot be reached.
        """
        name, _, value = text.partition("=")
        most = {"psnr": MOST_DB, "ssim": 1.0, "judge": 1.0}
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in most or not 0 < number <= most[name]:
            ranges = ", ".join(f"{key}=VALUE (above 0 to {top:g})" for key, top in most.items())
            raise ConfigError(f"target {text!r}: write one of {ranges}; psnr=30, ssim=0.95, judge=0.9")
        return cls(name, number)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.measure} {self.value:g}" + (" dB" if self.measure == "psnr" else "")


def parse_budget(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``1.5h`` or ``1h30m``.

    Raises:
        ConfigError: something else.
    """
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip())
    try:
        seconds = sum(float(part) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True) if part) if parts else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"budget {text!r}: write a time like 90s, 30m or 1h30m")
    return seconds


def ladder_of(steps: int) -> tuple[int, ...]:
    """The numbers of steps that are tried for a pipeline that takes ``steps``, largest first."""
    return tuple(sorted({max(1, round(steps * 2 ** (-i / 2))) for i in range(RUNGS)}, reverse=True))


@dataclass(frozen=True)
class TuneSettings:
    """What to reach, and on what.

    goal      the fidelity to reach
    samples   the pictures that candidates are judged on
    held_out  other ones, for the end
    steps     the plain pipeline's own number of steps
    call      what all calls share (guidance scale, size...)
    ladder    numbers of steps that are tried, largest first [default: `ladder_of`]
    reference_steps  steps of the plain pipeline whose pictures are the measure of psnr and ssim [default: ``steps``]
    budget    seconds, the end included, all attempts of an interrupted run together; None: ``trials`` alone counts
    trials    how many candidates are measured, those that refuse included; None: ``budget`` alone counts
    rounds, final_rounds  timed calls of a candidate in its trial and in the end
    batch     samples in one call for the pictures (1 where a plugin couples the samples of a batch)
    """

    goal: Goal
    samples: tuple[Sample, ...]
    held_out: tuple[Sample, ...]
    steps: int
    call: CallSettings = field(default_factory=CallSettings)
    ladder: tuple[int, ...] = ()
    reference_steps: int | None = None
    budget: float | None = None
    trials: int | None = None
    rounds: int = 2
    final_rounds: int = 7
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "rounds", "final_rounds", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be >= 1")
        if self.budget is None and self.trials is None:
            raise ConfigError("when to stop? give --budget 30m, --trials N, or both")
        if not self.samples or not self.held_out:
            raise ConfigError("nothing to judge on: give at least one prompt or seed for the search and one for the end")
        if set(self.samples) & set(self.held_out):
            raise ConfigError("held_out has pictures of the search: the end needs other prompts or other seeds")
        if self.reference_steps is not None and self.reference_steps < self.steps:
            raise ConfigError(f"reference_steps = {self.reference_steps}: must be at least the pipeline's own {self.steps} steps")
        rungs = tuple(sorted({self.steps, *(self.ladder or ladder_of(self.steps))}, reverse=True))
        if rungs[-1] < 1 or rungs[0] > self.steps:
            raise ConfigError(f"ladder = {self.ladder}: numbers of steps from 1 to the pipeline's own {self.steps}")
        object.__setattr__(self, "ladder", rungs)


# what comes out --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """``steps``, and a stack: knobs by plugin, outermost first; none is the plain pipeline."""

    steps: int
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What makes two candidates the same."""
        return json.dumps([self.steps, list(self.plugins.items())], default=str)

    def __str__(self) -> str:
        parts = [f"{name}({', '.join(f'{k}={v}' for k, v in knobs.items())})" if knobs else name for name, knobs in self.plugins.items()]
        return f"{' + '.join(parts) or 'plain'}, {self.steps} steps"


@dataclass(frozen=True)
class Trial:
    """A candidate and what was measured, or the ``reason`` why it refused.

    seconds, beside  of the rounds: the candidate's, the plain pipeline's
    ratio            median of seconds / beside
    values           fidelity by picture
    notes            what plugins said in the last round
    spent            seconds that the whole trial took
    """

    number: int
    candidate: Candidate
    seconds: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reason: str | None = None
    spent: float = 0.0

    @property
    def ratio(self) -> float:
        return statistics.median(a / b for a, b in zip(self.seconds, self.beside, strict=True))

    @property
    def fidelity(self) -> float:
        return statistics.fmean(self.values)


@dataclass(frozen=True)
class Final:
    """A side of the end, on prompts that the search has not seen.

    of_plain        by round: its seconds / those of the plain pipeline with its default steps
    against_fewer   by round: seconds of ``fewer_steps`` / its own; None for the plain sides
    faster          than fewer steps: see ``METHOD``
    reaches, surely whether the mean reaches the target, and whether all of the interval says the same
    ready           Python that loads and runs it
    """

    kind: Literal["plain", "fewer_steps", "stack"]
    candidate: Candidate
    seconds: Spread
    of_plain: Spread
    fidelity: Mean
    reaches: bool
    surely: bool
    against_fewer: Spread | None
    faster: bool | None
    ready: str


@dataclass
class Tuning:
    """The result. ``winner``: the fastest stack that reaches the target in the end and beats fewer steps there, or None."""

    pipeline: str
    settings: TuneSettings
    trials: list[Trial]
    front: list[Trial]
    finals: list[Final]
    winner: Final | None
    left_out: dict[str, str]
    environment: dict[str, Any]
    spent: float
    exhausted: bool

    @property
    def fewer_steps(self) -> Final:
        return next(final for final in self.finals if final.kind == "fewer_steps")

    @property
    def best(self) -> Final:
        """What to use: the winner, else the plain pipeline with fewer steps."""
        return self.winner or self.fewer_steps

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and texts."""
        trials = [
            {**plain(trial), "ratio": trial.ratio, "fidelity": trial.fidelity} if trial.reason is None else plain(trial)
            for trial in self.trials
        ]
        derived = {"trials": trials, "front": [trial.number for trial in self.front], "ready": self.best.ready}
        return {"schema": SCHEMA, "method": METHOD, **plain(self), **derived}


def front_of(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other one beats: fastest first, each slower one nearer."""
    front: list[Trial] = []
    for trial in sorted((t for t in trials if t.reason is None), key=lambda t: (t.ratio, -t.fidelity)):
        if not front or trial.fidelity > front[-1].fidelity:
            front.append(trial)
    return front


def arguments_of(candidate: Candidate, call: CallSettings) -> dict[str, Any]:
    """The arguments that a candidate was called with here, without what was drawn anew for each picture."""
    names = ("guidance_scale", "negative_prompt", "height", "width")
    said = {"num_inference_steps": candidate.steps, **{name: getattr(call, name) for name in names}, **call.extra}
    return {name: value for name, value in said.items() if value is not None}


def ready_line(pipeline: str, candidate: Candidate, call: CallSettings) -> str:
    """Python that loads a candidate and calls it as it was called here."""
    plugins = f", plugins={candidate.plugins!r}" if candidate.plugins else ""
    arguments = ", ".join(f"{name}={value!r}" for name, value in arguments_of(candidate, call).items())
    return f"pipe = load_pipeline({pipeline!r}{plugins}); pipe(..., {arguments})"
