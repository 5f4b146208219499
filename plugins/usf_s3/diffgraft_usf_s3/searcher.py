"""S3: the search for a solver schedule, for `diffgraft evolve`. A genome is a schedule as JSON (see :mod:`.decisions`)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from diffgraft import ConfigError, PluginConfig
from diffgraft.methods.schema import Holds
from diffgraft.methods.search import Genome, Probe, Searcher
from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from diffgraft_usf_s3.decisions import HIGHEST, SolverSchedule, known_solver, spread
from diffgraft_usf_s3.knobs import USFConfig, scheduler_like
from diffgraft_usf_s3.method import NoiseSchedule, relaxation

KNOWN = (("unipc", 2), ("dpm++", 2), ("unipc", 3), ("dpm++ heun", 2), ("dpm++", 3), ("ddim", 1), ("dpm", 2), ("unipc bh1", 2))
"""Solvers of the first generation, each on each table of timesteps, as far as the population goes."""


class Facts(TypedDict):
    """Of what a search found."""

    genome: dict[str, Any]
    guidance_scale: NotRequired[float | None]


def not_a_schedule(tensors: Mapping[str, Any], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a genome, or None."""
    try:
        SolverSchedule.parse(facts["genome"])
    except ConfigError as error:
        return f"its genome cannot be run: {error}"
    return None


HOLDS = Holds(facts=Facts, also=not_a_schedule)


class S3Search(PluginConfig):
    """Knobs of the search (``--set name=value``)."""

    mutation: float = Field(0.3, gt=0, le=1, description="probability that a mutation changes a field of a step (official, EDM: 0.3)")
    time_sigma: float = Field(0.08, gt=0, le=1, description="a timestep is multiplied by 1 + N(0, time_sigma^2) (official, EDM: 0.08)")
    relax_sigma: float = Field(
        0.1, gt=0, le=1, description="the relaxation's coefficient c moves by N(0, relax_sigma^2) (official, EDM: 0.03)"
    )
    gentle: float = Field(
        3.0,
        ge=0,
        le=6,
        description="own: each mutation draws u in 0 to this and scales mutation, the sigmas and move by 2^-u; 0 = official",
    )
    move: float = Field(0.2, ge=0, le=1, description="probability that a step is deleted and one inserted elsewhere (official: 0.2 each)")
    deep: float = Field(0.5, ge=0, le=1, description="probability that a crossover mixes step by step, not field by field (official: 0.5)")
    types: bool = Field(True, description="whether steps may predict eps (0.5 each; official: 0.3 eps, 0.3 x0, 0.4 DPM-Solver-v3's)")
    analytical: bool = Field(False, description="whether a run may begin with an analytical step (official: yes); not for flow models")
    correct: float = Field(0.5, ge=0, le=1, description="probability of a corrector in a step whose corrector mutates (official: 0.5)")


class S3Searcher(Searcher):
    """Timesteps, prediction types, orders, active points, relaxations and correctors of a fixed number of steps."""

    Config = S3Search
    config: S3Search
    noise: NoiseSchedule
    tables: list[tuple[list[float], float | None]]

    def prepare(self, probe: Probe) -> None:
        scheduler = scheduler_like(probe.scheduler, probe.target.family)
        if self.config.analytical and scheduler.noise.flow:
            raise ConfigError("search of usf_s3: analytical = True is not for flow models: leave it out")
        self.noise, n = scheduler.noise, getattr(probe.scheduler, "num_inference_steps", None) or probe.steps  # Heun's timesteps are more
        first, last = scheduler.ends
        even, own = spread(first, last, n), sorted({float(t) for t in probe.timesteps}, reverse=True)
        own = own if len(own) == n else even
        if self.noise.flow:  # the pipeline's own sigmas, and further shifts of them
            shifted = [[self.noise.steps * s * t / (self.noise.steps + (s - 1) * t) for t in own] for s in (2.0, 0.5)]
            self.tables = [(own, None), *(([round(t, 2) for t in times], None) for times in shifted), (own, round(0.3 * own[-1], 2))]
        else:
            lam = np.linspace(*(self.noise.level(t).lam for t in (first, last)), n + 1)[:-1]
            by_lam = [self.noise.t(float(x)) for x in lam]
            between = [(a + b) / 2 for a, b in zip(even, by_lam, strict=True)]
            quadratic = [first * (1 - k / n) ** 2 for k in range(n)]
            tables = [([round(t, 2) for t in times], 0.0) for times in (even, by_lam, between, quadratic, own)]
            self.tables = [*tables, (even, None)]
        legal = [(times, end) for times, end in self.tables if _legal(_of(times, end, known_solver("ddim", n)))]
        self.tables = [table for i, table in enumerate(legal) if table not in legal[:i]]

    def check(self, knobs: Mapping[str, Any]) -> None:
        if knobs.get("schedule") is not None or knobs.get("artefact") is not None:
            raise ConfigError("search of usf_s3: schedule and artefact take the place of what is searched: leave them out")
        for name in ("solver", "order"):
            if name in knobs and knobs[name] != USFConfig.model_fields[name].default:
                raise ConfigError(f"search of usf_s3: {name} = {knobs[name]!r} is not heeded, every candidate is a schedule: leave it out")

    def first(self, rng: random.Random, number: int, size: int) -> Genome | None:
        """Known solvers: the default one on even timesteps, on the other tables, then other solvers; mutations in the last third."""
        known = [(table, solver) for solver in KNOWN for table in self.tables]
        if number < min(len(known), max(2 * size // 3, 1)):
            (times, end), (name, order) = known[number]
            return _of(times, end, known_solver(name, len(times), order))
        return self.mutate(rng, self._known(rng), 0)

    def _known(self, rng: random.Random) -> Genome:
        (times, end), (name, order) = rng.choice(self.tables), rng.choice(KNOWN)
        return _of(times, end, known_solver(name, len(times), order))

    def draw(self, rng: random.Random, epoch: int) -> Genome | None:
        """A known solver, mutated twice."""
        genome = self._known(rng)
        for _ in range(2):
            genome = self.mutate(rng, genome, epoch) or genome
        return genome

    def mutate(self, rng: random.Random, parent: Genome, epoch: int) -> Genome | None:
        """Each field of each step changes with probability ``mutation`` 2^-u; a step may move."""
        strength, n = 2 ** -rng.uniform(0, self.config.gentle), len(parent["timesteps"])
        p = self.config.mutation * strength
        times, end, steps = list(parent["timesteps"]), parent["end"], [dict(step) for step in parent["steps"]]
        if n > 1 and rng.random() < self.config.move * strength:
            out, into = rng.randrange(1, n), rng.uniform(end or 0.0, times[0])
            moved = steps.pop(out)
            del times[out]
            place = sum(t > into for t in times)
            times.insert(place, into)
            steps.insert(place, moved)
        for k in range(n):
            if rng.random() < p:
                times[k] = min(times[k] * (1 + rng.gauss(0, self.config.time_sigma * strength)), self.noise.last)
        times = [round(t, 2) for t in sorted(times, reverse=True)]
        if rng.random() < p:
            end = rng.choice((None, round(rng.uniform(0.05, 0.6) * times[-1], 2), *(() if self.noise.flow else (0.0,))))
        lam = [self.noise.level(t).lam for t in (*times, *(() if end is None else (end,)))]
        for k, step in enumerate(steps):
            steps[k] = self._mutated(rng, step, k, lam[k + 1] - lam[k] if k + 1 < len(lam) else 0.0, p, self.config.relax_sigma * strength)
        first = parent.get("first", "model")
        if self.config.analytical and not self.noise.flow and rng.random() < p:
            first = rng.choice(("model", "zero_x0"))
        if first == "zero_x0":
            times[0] = min(times[0], self.noise.last - 1)
        return _legal(_mended(times, end, first, steps))

    def _mutated(self, rng: random.Random, step: dict[str, Any], k: int, h: float, p: float, sigma: float) -> dict[str, Any]:
        if rng.random() < p:
            order = min(rng.choices((1, 2, 3, 4), (0.2, 0.4, 0.3, 0.1))[0], k + 1)
            if order != step["order"]:
                step = {"type": step["type"], "order": order, **({"correct": step["correct"]} if "correct" in step else {})}
        if self.config.types and rng.random() < p:
            step["type"] = rng.choice(("eps", "x0"))
        if step["order"] > 1 and rng.random() < p:  # from what the factor is now, also where it has a name
            c = (relaxation(step.get("relax"), h, step["type"]) - 1) / h if h > 0 else 0.0
            step["relax"] = round(c + rng.gauss(0, sigma), 4)
        elif step["order"] > 1 and rng.random() < p / 3:
            step["relax"] = rng.choice(("dpm2", "bh1", "exp+", "exp-"))
        if step["order"] > 2 and rng.random() < p:  # the first derivative from 1 or 2 points
            full = [-i for i in range(2, step["order"] + 1)]
            step["points"] = [full[: rng.choice((1, 2))], *[full] * (step["order"] - 2)]
        if rng.random() < p:
            step.pop("correct", None)
            if rng.random() < self.config.correct:
                step["correct"] = {"order": step["order"] + 1}
        return step

    def cross(self, rng: random.Random, one: Genome, other: Genome) -> Genome | None:
        """The timesteps of one of two parents; the decisions of one, or of either step by step."""
        times = rng.choice((one, other))
        if rng.random() < self.config.deep:
            steps = [rng.choice(both) for both in zip(one["steps"], other["steps"], strict=True)]
        else:
            steps = (other if times is one else one)["steps"]
        first = times.get("first", "model")
        return _legal(_mended(times["timesteps"], times["end"], first, [dict(step) for step in steps]))

    def steps(self, genome: Genome) -> int:
        return len(genome["timesteps"])

    def knobs(self, genome: Genome) -> dict[str, Any]:
        return {"schedule": genome}

    def example(self, rng: random.Random) -> Genome:
        """The first table, with a mutated solver: what is in a file that a test makes."""
        times, end = self.tables[0]
        return self.mutate(rng, _of(times, end, known_solver("unipc", len(times))), 0) or _of(times, end, known_solver("dpm", len(times)))


def _of(times: list[float], end: float | None, steps: Any) -> Genome:
    plain = [SolverSchedule.model_construct(timesteps=(), end=None, steps=(step,)).plain()["steps"][0] for step in steps]
    return {"timesteps": list(times), "end": end, "steps": plain}


def _mended(times: list[float], end: float | None, first: str, steps: list[dict[str, Any]]) -> Genome:
    """Decisions that lost their place by a move or a crossover, in the form that fits where they are now."""
    n = len(steps)
    for k, step in enumerate(steps):
        most = 1 if k == n - 1 and end is None else min(HIGHEST, k + 1)
        if step["order"] > most or (step["order"] == 1 and "points" in step):
            step["order"] = min(step["order"], most)
            step.pop("points", None)
        if step["order"] == 1:
            step.pop("relax", None)
        if k == n - 1:
            step.pop("correct", None)
        elif "correct" in step and step["correct"]["order"] != step["order"] + 1:
            step["correct"] = {"order": step["order"] + 1}
    return {"timesteps": times, "end": end, "first": first, "steps": steps}


def _legal(genome: Genome) -> Genome | None:
    try:
        return SolverSchedule.parse(genome).plain()
    except ConfigError:
        return None
