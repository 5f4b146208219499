"""``search``: an evolution over a plugin's genomes, each judged by running the pipeline on the same prompts and noises.

The plugin says what a genome is, how one is drawn, mutated and crossed, and which knobs it stands for (:class:`Searcher`); the loop, the
fitness, the record of every candidate and the file in the end are here. Every judged candidate lies in ``OUT.partial/`` before the next
one begins, and the loop is a function of its seed and the fitnesses alone: a search that was interrupted anywhere runs through the
candidates that it knows, goes on with the first that it does not, and ends where an uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffgraft.installed.anatomy import Target
from diffgraft.installed.config import PluginConfig, build_config
from diffgraft.installed.errors import ConfigError, RewardError
from diffgraft.installed.planner import Part
from diffgraft.installed.planner import plan as plan_stack
from diffgraft.installed.plugin import Paper, Plugin
from diffgraft.kernel.calls import DenoiseCall, RunCall, Schedule, ScheduleCall
from diffgraft.kernel.given import describe
from diffgraft.kernel.loading import load_pipeline
from diffgraft.methods.artefacts import MadeFor
from diffgraft.methods.calibration import OnProgress, plain
from diffgraft.methods.files import claim, partial_of, work_digest, write_json
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import Fitness, make_outputs
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.named import declared
from diffgraft.methods.watching import Watcher, made_for, watching

Genome = Any
"""A plain JSON value."""

EXAMPLES = 8
"""Genomes of a ranking that is made for a test."""
TRIES = 10
"""How often a new genome is drawn for each that is wanted, before fewer are taken: a small space has no more."""


@dataclass(frozen=True)
class Probe:
    """What a searcher may look at: the pipeline, and what its scheduler makes of the call.

    scheduler  the one that runs: the pipeline's own, or that of a plugin beside
    steps      the number of steps that was asked for
    timesteps  the scheduler's own [n], sigmas [n + 1] or None, on the CPU
    """

    target: Target
    scheduler: Any
    steps: int
    timesteps: Tensor
    sigmas: Tensor | None


class Searcher:
    """What a plugin says about its genomes. A genome is a plain JSON value; two with the same JSON are the same candidate.

    Config   knobs of the search itself (mutation rates and the like)
    ranks    whether every judged genome is worth keeping, not the best alone: the file then has them all ("ranking")
    not_by   fitnesses that say nothing of these genomes: name -> why
    breeds   whether mutations and crossovers are made
    own_noise  whether a candidate says which noise it draws, so that the samples' seeds are not used

    Every draw is made from the ``rng`` that is given. ``epoch`` counts the generations that are judged already. A method that draws may
    return None: that try gave nothing legal.
    """

    Config: ClassVar[type[PluginConfig]] = PluginConfig
    ranks: ClassVar[bool] = False
    not_by: ClassVar[Mapping[str, str]] = {}
    breeds: ClassVar[bool] = True
    own_noise: ClassVar[bool] = False

    def __init__(self, name: str = "search", **knobs: Any) -> None:
        self.config = build_config(name, self.Config, knobs)

    def check(self, knobs: Mapping[str, Any]) -> None:
        """Refuse knobs of the plugin, of those that were set, which the search would not heed. Raise ``ConfigError``."""

    def prepare(self, probe: Probe) -> None:
        """Learn the space from the pipeline. Raise ``Unsupported`` or ``ConfigError`` where there is none."""

    def first(self, rng: random.Random, number: int, size: int) -> Genome | None:
        """Member ``number`` (0 ... size - 1) of the first generation; number 0 is the start that every other is measured against."""
        raise NotImplementedError

    def draw(self, rng: random.Random, epoch: int) -> Genome | None:
        """Any genome."""
        raise NotImplementedError

    def mutate(self, rng: random.Random, parent: Genome, epoch: int) -> Genome | None:
        """A changed copy."""
        raise NotImplementedError

    def cross(self, rng: random.Random, one: Genome, other: Genome) -> Genome | None:
        """A child of two."""
        raise NotImplementedError

    def steps(self, genome: Genome) -> int:
        """With how many steps the pipeline is called for it."""
        raise NotImplementedError

    def knobs(self, genome: Genome) -> dict[str, Any]:
        """The plugin's knobs that it stands for."""
        raise NotImplementedError

    def example(self, rng: random.Random) -> Genome:
        """A genome at which the method shows, whatever it is worth: for tests."""
        return self.draw(rng, 0)


# the loop ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a search goes: ``mutations`` and ``crossovers`` of the ``top`` best so far, and new draws, make a generation of ``population``.

    The default is the one of AutoDiffusion (arXiv 2309.10438).
    """

    population: int = 50
    top: int = 10
    mutations: int = 25
    crossovers: int = 10
    epochs: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("population", "top", "epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"search: {name} = {getattr(self, name)}: at least 1")
        if self.mutations < 0 or self.crossovers < 0 or self.mutations + self.crossovers > self.population:
            raise ConfigError(
                f"search: mutations = {self.mutations}, crossovers = {self.crossovers}: together 0 to population = {self.population}"
            )

    @classmethod
    def of(cls, population: int, **given: int | None) -> Plan:
        """Any size, in the proportions of the default where nothing else is given."""
        shares = {"top": max(1, population // 5), "mutations": population // 2, "crossovers": population // 5}
        return cls(population, **{**shares, **{name: value for name, value in given.items() if value is not None}})


@dataclass(frozen=True)
class Evolved:
    """``best`` genome with its ``loss``, the ``start`` that member 0 of the first generation was, an entry a generation in ``history``, and
    the ``ranking``: all that were judged with their losses, best first."""

    best: Genome
    loss: float
    start: float
    judged: int
    history: list[dict[str, Any]]
    ranking: list[tuple[Genome, float]]


def key_of(genome: Genome) -> str:
    """What makes two genomes the same candidate."""
    return json.dumps(genome, sort_keys=True)


def evolve(searcher: Searcher, judge: Callable[[Genome], float], plan: Plan, on_progress: OnProgress | None = None) -> Evolved:
    """Minimise ``judge`` (called once a candidate, in a fixed order) over the searcher's genomes: pure but for what ``judge`` does.

    Raises:
        RewardError: ``judge`` gave no finite number.
    """
    rng = random.Random(plan.seed)
    losses: dict[str, float] = {}
    genomes: dict[str, Genome] = {}
    total = plan.population * plan.epochs
    best: list[str] = []

    def take(make: Callable[[], Genome | None], wanted: int) -> int:
        """Judge up to ``wanted`` new genomes; how many there were."""
        taken, tries = 0, TRIES * wanted
        while taken < wanted and tries:
            tries -= 1
            genome = make()
            key = key_of(genome)
            if genome is None or key in losses:
                continue
            loss = float(judge(genome))
            if not math.isfinite(loss):
                raise RewardError(f"search: the fitness is {loss} for the candidate {key}: it must be a finite number")
            losses[key], genomes[key] = loss, genome
            taken += 1
            if on_progress:
                on_progress("search", min(len(losses), total), total)
        return taken

    def parent() -> Genome:
        return genomes[rng.choice(best)]

    for number in range(plan.population):
        take(partial(searcher.first, rng, number, plan.population), 1)
    if not losses:
        raise ConfigError("search: the searcher gives no candidate to begin with")
    history: list[dict[str, Any]] = []
    for epoch in range(plan.epochs):
        best = sorted(losses, key=losses.__getitem__)[: plan.top]  # a stable sort: of equals the earlier one is the better
        mean = math.fsum(losses[key] for key in best) / len(best)
        history.append({"judged": len(losses), "best": losses[best[0]], "mean_of_top": mean})
        if epoch + 1 < plan.epochs:
            made = take(partial(_mutant, searcher, rng, parent, epoch), plan.mutations)
            made += take(lambda: searcher.cross(rng, parent(), parent()), plan.crossovers)
            take(partial(searcher.draw, rng, epoch), plan.population - made)
    ranking = [(genomes[key], losses[key]) for key in sorted(losses, key=losses.__getitem__)]
    return Evolved(genomes[best[0]], losses[best[0]], next(iter(losses.values())), len(losses), history, ranking)


def _mutant(searcher: Searcher, rng: random.Random, parent: Callable[[], Genome], epoch: int) -> Genome | None:
    return searcher.mutate(rng, parent(), epoch)


# candidates on a pipeline --------------------------------------------------------------------------------------------------------------


class Records:
    """Every judged candidate, a small file each in ``folder``; they are read back in the order in which they were written."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.read = 0
        claim(folder, "search", digest)

    def loss(self, genome: Genome, judge: Callable[[Genome], float]) -> float:
        """What is recorded for the next candidate, or what ``judge`` says of it now."""
        path = self.folder / f"{self.read:05d}.json"
        if path.exists():
            record = json.loads(path.read_text(encoding="utf-8"))
            if key_of(record["genome"]) != key_of(genome):
                raise ConfigError(f"{path} is a candidate of another search: delete {self.folder}, or choose another --out")
            loss = float(record["loss"])
        else:
            loss = float(judge(genome))
            if math.isfinite(loss):
                write_json(path, {"genome": genome, "loss": loss})
        self.read += 1
        return loss


def search(
    pipe: Any,
    plugin: Plugin,
    samples: Sequence[Sample],
    settings: CallSettings,
    out: str | os.PathLike[str],
    fitness: Fitness,
    *,
    plan: Plan | None = None,
    knobs: dict[str, Any] | None = None,
    beside: Sequence[Plugin] = (),
    batch: int = 16,
    on_progress: OnProgress | None = None,
) -> Finding:
    """Search the settings of ``plugin`` for this pipeline and write the best to ``out``; afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        samples: the prompts and seeds that every candidate is judged on, in calls of ``batch``.
        settings: steps, guidance scale and size: what is found fits these only.
        fitness: what is minimised, see `diffgraft.methods.fitness`.
        plan: size and length of the evolution [default: population 50, 10 generations].
        knobs: of the searcher.
        beside: plugins that every candidate runs with, inside ``plugin`` (a solver: what is found then fits it, and no other).

    Raises:
        Unsupported: the plugin cannot be searched, or does not work on this pipeline.
        Conflict: it does not fit together with those beside it.
        ConfigError: no prompt, no number of steps, a fitness that says nothing of its genomes, or ``out`` holds an unfinished search of
            something else.
        RewardError: the fitness of a candidate is no finite number; those before it are kept.
    """
    made_by = declared(plugin, "search")
    if not samples or settings.steps is None:
        raise ConfigError("a search needs prompts to judge the candidates on, and the number of steps: give --prompts and --steps")
    plan = plan or Plan()
    if why := made_by.not_by.get(fitness.name):
        raise ConfigError(f"search of {plugin.name}: fitness = {fitness.name!r}: {why}")
    if made_by.own_noise:
        _ensure_other_noise(plugin.name, samples, fitness)
    searcher = made_by(f"search of {plugin.name}", **(knobs or {}))
    searcher.check(plugin.own_knobs)

    def look_call() -> None:
        make_outputs(pipe, samples[:1], settings, batch, False)

    plan_stack([Part.of(each) for each in (plugin, *beside)]).ensure()
    probe, fits, guidance = look(pipe, plugin, look_call, beside)
    searcher.prepare(probe)
    others = {each.name: {knob: str(value) for knob, value in each.own_knobs.items()} for each in beside}
    what = {
        "plugin": plugin.name,
        "knobs": plugin.config.model_dump(mode="json"),
        "beside": others,
        "searcher": searcher.config.model_dump(mode="json"),
        "plan": asdict(plan),
        "samples": [asdict(sample) for sample in samples],
        "call": plain(settings),
        "batch": batch,
        "fitness": fitness.describe(),
        "model": asdict(fits),
    }
    digest = work_digest(what)
    folder = partial_of(out)
    records = Records(folder, digest)
    fitness.prepare(pipe, samples, settings, batch, folder, on_progress)
    prompts = [sample.wanted or "" for sample in samples]
    stack = None

    def judge(genome: Genome) -> float:
        nonlocal stack
        setting = {**plugin.own_knobs, **searcher.knobs(genome)}
        if stack is None:
            stack = load_pipeline(pipe, [type(plugin)(**setting), *beside]).plugins
        else:
            stack.configure(plugin.name, **setting)
        made = make_outputs(pipe, samples, replace(settings, steps=searcher.steps(genome)), batch, fitness.wants_latents)
        return fitness.loss(made, prompts)

    try:
        evolved = evolve(searcher, lambda genome: records.loss(genome, judge), plan, on_progress)
    finally:
        if stack is not None:
            stack.clear()
    finding = Finding(
        replace(fits, steps=searcher.steps(evolved.best)),
        {},
        {
            "genome": evolved.best,
            "fitness": {**fitness.describe(), "loss": evolved.loss, "loss_of_start": evolved.start},
            "guidance_scale": guidance,
            "beside": others,
            "prompts": {
                "number": len(samples),
                "sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
                **({} if searcher.own_noise else {"seeds": [sample.seed for sample in samples]}),
            },
            "plan": asdict(plan) if searcher.breeds else {"population": plan.population, "epochs": plan.epochs},
            "searcher": searcher.config.model_dump(mode="json"),
            "judged": evolved.judged,
            "history": evolved.history,
            **({"ranking": [list(pair) for pair in evolved.ranking]} if searcher.ranks else {}),
        },
    )
    finding.save(out)
    shutil.rmtree(folder)
    return finding


def _ensure_other_noise(plugin: str, samples: Sequence[Sample], fitness: Fitness) -> None:
    """Raises ConfigError where a candidate that says its noise would draw a picture twice, or be held against what other noise makes."""
    asked = [(sample.prompt, sample.class_label) for sample in samples]
    if twice := [sample.label for sample, each in zip(samples, asked, strict=True) if asked.count(each) > 1]:
        raise ConfigError(
            f"search of {plugin}: {twice[0]!r} is asked for more than once, and a candidate draws the same picture each time: ask for each "
            f"once (--samples {len(set(asked))}, or none)"
        )
    if "reference_steps" in fitness.describe():
        raise ConfigError(
            f"search of {plugin}: fitness = {fitness.name!r} without reference pictures compares with the pipeline's own, and candidates "
            "of their noise would be the nearer: give --reference FOLDER"
        )


def search_call(pipe: Any, plugin: Plugin, call: Callable[[], Any], seed: int = 0) -> Finding:
    """An example genome for what ``call()`` runs, not searched for: enough for a test on random weights; nothing is written.

    Raises:
        Unsupported: the plugin cannot be searched, or does not work on this pipeline.
    """
    made_by = declared(plugin, "search")
    searcher = made_by(f"search of {plugin.name}")
    probe, fits, guidance = look(pipe, plugin, call)
    searcher.prepare(probe)
    rng = random.Random(seed)
    examples = [searcher.example(rng) for _ in range(EXAMPLES if searcher.ranks else 1)]
    ranking = {"ranking": [[genome, float(i)] for i, genome in enumerate(examples)]} if searcher.ranks else {}
    return Finding(fits, {}, {"genome": examples[0], "guidance_scale": guidance, **ranking})


# a first look --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """Of one run."""

    schedule: Schedule | None = None
    guidance: float | None = None


class Look(Watcher):
    """Sees what the scheduler makes of a call."""

    name = "look"
    paper = Paper("none", "", "a look at a plain run")
    State = Seen

    def schedule(self, call: ScheduleCall, next: Callable[[ScheduleCall], Schedule]) -> Schedule:
        made = next(call)
        call.shared.schedule = Schedule(*(None if x is None else x.detach().to("cpu", copy=True) for x in made))
        return made

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        if call.step.index == 0:
            call.shared.guidance = call.run.guidance_scale(call.model_name)
        return next(call)

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        seen: Seen = call.shared
        assert seen.schedule is not None
        found = {"timesteps": seen.schedule.timesteps}
        if seen.schedule.sigmas is not None:
            found["sigmas"] = seen.schedule.sigmas
        if seen.guidance is not None:
            found["guidance"] = torch.tensor(seen.guidance, dtype=torch.float64)
        return found


def look(pipe: Any, plugin: Plugin, call: Callable[[], Any], beside: Sequence[Plugin] = ()) -> tuple[Probe, MadeFor, float | None]:
    """What a searcher may look at, what a finding is made for, and the guidance scale, from one run without ``plugin``."""
    watcher = Look()
    with watching(pipe, plugin, watcher, beside) as stack:
        call()
        fits, scheduler = made_for(plugin, stack), stack.run_scheduler()
    seen = stack.report().plugins[watcher.name].records
    guidance = seen.get("guidance")
    probe = Probe(describe(pipe, stack.family), scheduler, len(seen["timesteps"]), seen["timesteps"], seen.get("sigmas"))
    return probe, fits, None if guidance is None else float(guidance)
