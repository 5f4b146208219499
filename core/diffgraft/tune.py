"""``tune``: the fastest way to a wanted fidelity on one pipeline, over numbers of steps, legal stacks of plugins and their knobs.

A plugin says which values of which knobs are worth trying (``Plugin.tune``); the planner says which stacks are legal. Optuna proposes,
every candidate is timed in turn with the plain pipeline, and all of it lies in ``OUT.partial/`` before the next one begins: proposals are
a function of the seed and of what was measured so far, so that an interrupted run goes on with the same command. What a search finds best
on some prompts was partly luck: in the end its best candidates meet the plain pipeline with fewer steps on prompts that it has not seen.
The engine prints and draws nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch

from diffgraft import registry
from diffgraft.artefacts import Fingerprint, scheduler_facts
from diffgraft.calibration import OnProgress, calibrate
from diffgraft.calibration import plain as plain_call
from diffgraft.compare import Judge, all_right, as_seen, plain, quiet
from diffgraft.doctor import machine, versions
from diffgraft.errors import ConfigError, DiffgraftError, Unsupported
from diffgraft.files import write_atomic
from diffgraft.findings import write_json
from diffgraft.inputs import CallSettings, Sample, make_pictures
from diffgraft.instruments import synchronize
from diffgraft.loading import load_pipeline
from diffgraft.metrics import Mean, Pictures, Spread, psnr, share, ssim
from diffgraft.needs import fetch
from diffgraft.planner import Part, plan
from diffgraft.plugin import Need, Plugin
from diffgraft.stack import describe, ensure_bare

SCHEMA = 1
"""Number of the layout of ``tune.json``."""
RUNGS = 8
"""Numbers of steps that are tried, from the pipeline's own down, two a halving: 50, 35, 25, 18, 12, 9, 6, 4."""
MOST_DB = 100.0
"""PSNR of equal pictures, which is infinite, counts as this in means; 8-bit files of equal look differ by about 59 dB."""
TRIES = 64
"""How often a candidate that is not known yet is asked for before the space counts as exhausted; the second half is drawn blindly."""
STARTUP = 10
"""Trials before Optuna's sampler models anything."""
FINALISTS = 3
CALIBRATION_SAMPLES = 8
CALIBRATION_SHARE = 0.25
"""The most of a budget that goes into artefacts, all plugins together."""

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


# what is asked for -----------------------------------------------------------------------------------------------------------------------


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
    if seconds <= 0:
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


def ready_line(pipeline: str, candidate: Candidate, call: CallSettings) -> str:
    """Python that loads a candidate and calls it as it was called here."""
    plugins = f", plugins={candidate.plugins!r}" if candidate.plugins else ""
    names = ("guidance_scale", "negative_prompt", "height", "width")
    said = {"num_inference_steps": candidate.steps, **{name: getattr(call, name) for name in names}, **call.extra}
    arguments = ", ".join(f"{name}={value!r}" for name, value in said.items() if value is not None)
    return f"pipe = load_pipeline({pipeline!r}{plugins}); pipe(..., {arguments})"


# the space -------------------------------------------------------------------------------------------------------------------------------


def find_plugins(pipe: Any, fixed: Mapping[str, Mapping[str, Any]]) -> tuple[list[Plugin], dict[str, str]]:
    """The installed plugins that declare what to tune and can be put on ``pipe``, with the knobs that are ``fixed``; and why others not.

    Raises:
        DiffgraftError: a plugin with fixed knobs, which somebody wants, cannot take part.
    """
    found: list[Plugin] = []
    left_out: dict[str, str] = {}
    for name in registry.installed():
        try:
            cls = registry.find(name)
            if not cls.tune and name not in fixed:
                continue
            plugin = cls(**fixed.get(name, {}))
            missing = [need.knob for need in cls.needs if getattr(plugin.config, need.knob) is None and not makes(plugin, need)]
            if missing:
                raise ConfigError(f"needs {', '.join(missing)}: give " + " ".join(f"-o {name}.{knob}=..." for knob in missing))
            ensure_fits(pipe, plugin)
        except DiffgraftError as error:
            if name in fixed:
                raise
            left_out[name] = str(error)
        else:
            found.append(plugin)
    return found, left_out


def makes(plugin: Plugin, need: Need) -> bool:
    """Whether the artefact is for us to make: the plugin can calibrate it, and nobody has given it or set it to none."""
    return need.kind == "artefact" and plugin.calibration is not None and need.knob not in plugin.config.model_fields_set


def ensure_fits(pipe: Any, plugin: Plugin) -> None:
    """Raises what attaching raises."""
    load_pipeline(pipe, [plugin]).plugins.clear()


class Space:
    """Which candidates there are: a number of steps, then plugin after plugin whether it takes part, where it can, and with which knobs.

    Every candidate is legal by construction: a plugin that does not go with those before it is not asked.
    """

    def __init__(self, plugins: Sequence[Plugin], ladder: Sequence[int]) -> None:
        self.plugins = plugins
        self.ladder = ladder
        self.tables = {
            plugin.name: {knob: values for knob, values in plugin.tune.items() if knob not in plugin.config.model_fields_set}
            for plugin in plugins
        }

    def draw(self, trial: Any) -> Candidate:
        """The candidate that an Optuna trial stands for (numbers of rungs and values: neighbours are alike)."""
        steps = self.ladder[trial.suggest_int("steps", 0, len(self.ladder) - 1)]
        stack: list[Plugin] = []
        knobs: dict[str, dict[str, Any]] = {}
        for plugin in self.plugins:
            longer = with_plugin(stack, plugin)
            if longer is None or not trial.suggest_int(f"use {plugin.name}", 0, 1):
                continue
            stack, table = longer, self.tables[plugin.name]
            chosen = {knob: v[trial.suggest_int(f"{plugin.name}.{knob}", 0, len(v) - 1)] for knob, v in table.items()}
            knobs[plugin.name] = {**plugin.own_knobs, **chosen}
        return Candidate(steps, {plugin.name: knobs[plugin.name] for plugin in stack})

    def first(self) -> list[dict[str, int]]:
        """What is measured before anything is proposed: fewer steps alone, then each plugin alone, gently, those to calibrate last."""
        none = {"steps": 0, **{f"use {plugin.name}": 0 for plugin in self.plugins}}
        gentle = [
            {**none, f"use {plugin.name}": 1, **{f"{plugin.name}.{knob}": 0 for knob in self.tables[plugin.name]}}
            for plugin in sorted(self.plugins, key=lambda p: any(makes(p, need) for need in p.needs))
        ]
        return [{**none, "steps": i} for i in range(len(self.ladder))] + gentle


def with_plugin(stack: Sequence[Plugin], plugin: Plugin) -> list[Plugin] | None:
    """``stack`` and ``plugin`` at the place with the fewest warnings, innermost of equals; None where the planner accepts none."""
    best: tuple[int, list[Plugin]] | None = None
    for place in range(len(stack), -1, -1):
        longer = [*stack[:place], plugin, *stack[place:]]
        verdict = plan([Part(one.name, one.effects) for one in longer])
        if not verdict.conflicts and (best is None or len(verdict.warnings) < best[0]):
            best = len(verdict.warnings), longer
    return None if best is None else best[1]


# the search ------------------------------------------------------------------------------------------------------------------------------


def tune(
    pipe: Any,
    plugins: Sequence[Plugin],
    settings: TuneSettings,
    out: str | os.PathLike[str],
    *,
    name: str,
    judge: Judge | None = None,
    left_out: Mapping[str, str] | None = None,
    command: str | None = None,
    on_progress: OnProgress | None = None,
) -> Tuning:
    """Look for the fastest way to ``settings.goal`` and write ``out/tune.json``; afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        plugins: the candidates, with the knobs that are fixed.
        name: of the pipeline, as ``load_pipeline`` takes it, for the ready line.
        judge: scores pictures against prompts; needed for the measure "judge".
        left_out: plugins that do not take part, and why: kept in the result.
        command: kept in the file.

    Raises:
        Unsupported: Optuna is not installed, or a plugin does not work on this pipeline.
        ConfigError: no judge, pictures too small for SSIM, a setting that the plain pipeline refuses, or ``OUT.partial`` holds an
            unfinished run of another command.
        Conflict: there are plugins on the pipeline.
    """
    optuna = find_optuna()
    ensure_bare(pipe, "what is tuned starts from the plain pipeline")
    if settings.goal.measure == "judge" and judge is None:
        raise ConfigError(f"target judge={settings.goal.value:g}: {name} brings no judge; take psnr or ssim")
    for plugin in plugins:
        ensure_fits(pipe, plugin)
    folder = Path(out).with_name(Path(out).name + ".partial")
    claim(folder, digest_of(pipe, plugins, settings))
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with quiet(pipe):
            tuner = Tuner(pipe, plugins, settings, folder, judge, on_progress or (lambda phase, done, total: None))
            exhausted = tuner.search(Study(optuna, folder, tuner.space, settings.seed))
            finals, winner = tuner.finish(Path(out), name)
    finally:
        optuna.logging.set_verbosity(before)
    environment = {"versions": {**versions(), "optuna": version("optuna")}, **machine(pipe.device), "dtype": str(pipe.dtype)}
    result = Tuning(
        type(pipe).__name__,
        settings,
        tuner.trials,
        front_of(tuner.trials),
        finals,
        winner,
        dict(left_out or {}),
        environment,
        tuner.spent(),
        exhausted,
    )
    write_json(Path(out) / "tune.json", {"pipeline_name": name, "command": command, **result.to_json()})
    shutil.rmtree(folder)
    return result


def find_optuna() -> Any:
    """Optuna, which proposes the candidates.

    Raises:
        Unsupported: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise Unsupported("`diffgraft tune` needs Optuna, which is not installed: pip install 'diffgraft[tune]'") from error
    return optuna


def digest_of(pipe: Any, plugins: Sequence[Plugin], settings: TuneSettings) -> str:
    """What must be the same for a run to go on. When to stop is not of it: more time for the same search is no other search."""
    what = {
        "plugins": [(plugin.name, plugin.own_knobs, plugin.tune) for plugin in plugins],
        "settings": asdict(replace(settings, budget=None, trials=1, call=CallSettings())),
        "call": plain_call(settings.call),
        "pipeline": type(pipe).__name__,
        "denoisers": [asdict(Fingerprint.of(model)) for model in describe_here(pipe).denoisers.values()],
        "scheduler": (type(pipe.scheduler).__name__, scheduler_facts(pipe.scheduler)),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def describe_here(pipe: Any) -> Any:
    """What a plugin's check may look at, of a pipeline without plugins."""
    return describe(pipe, registry.find_family(type(pipe)))


def claim(folder: Path, digest: str) -> None:
    """Begin in ``folder``, or go on there.

    Raises:
        ConfigError: it holds an unfinished run of something else.
    """
    path = folder / "tune.json"
    if not path.exists():
        write_json(path, {"digest": digest})
    elif json.loads(path.read_text(encoding="utf-8")).get("digest") != digest:
        raise ConfigError(
            f"{folder} holds an unfinished run with another model, other plugins, knobs, prompts or settings: finish that one, delete "
            "the folder, or choose another --out"
        )


class Study:
    """Optuna's side: who comes next, and what was measured, in a journal that survives an interruption at any point."""

    def __init__(self, optuna: Any, folder: Path, space: Space, seed: int) -> None:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.optuna, self.space, self.seed = optuna, space, seed
        self.states = optuna.trial.TrialState
        try:
            storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
            self.study = optuna.create_study(
                storage=storage, study_name="tune", directions=["minimize", "maximize"], load_if_exists=True
            )
        except ValueError as error:
            raise ConfigError(f"{folder / 'optuna.log'} cannot be read ({error}): delete {folder}, or choose another --out") from error
        for lost in self.study.get_trials(states=(self.states.RUNNING,)):  # an interrupted one begins anew, with the same candidate
            self.study.tell(lost.number, state=self.states.FAIL)

    def known(self) -> list[Trial]:
        """What was measured so far."""
        found: list[Trial] = []
        for one in self.study.get_trials(states=(self.states.COMPLETE, self.states.PRUNED)):
            candidate = self.space.draw(self.optuna.trial.FixedTrial(one.params))
            found.append(Trial(number=len(found), candidate=candidate, **one.user_attrs["measured"]))
        return found

    def sampler(self, number: int, attempt: int) -> Any:
        """The sampler of one proposal. Its seed is that of the proposal: what comes next does not depend on interruptions."""
        seed = random.Random(f"{self.seed} {number} {attempt}").getrandbits(32)
        if attempt >= TRIES // 2:
            return self.optuna.samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", self.optuna.exceptions.ExperimentalWarning)  # `group`: it has been one for years
            # TPE and not NSGA-II: a budget buys tens of trials, less than one population, and knobs exist only where their plugin does
            return self.optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP)

    def ask(self, known: Sequence[Trial]) -> tuple[Any, Candidate] | None:
        """The next candidate that is not known, or None when there is none left."""
        keys = {trial.candidate.key for trial in known}
        first = self.space.first()
        if len(known) < len(first):
            if not self.study.get_trials(states=(self.states.WAITING,)):
                self.study.enqueue_trial(first[len(known)])
            trial = self.study.ask()
            return trial, self.space.draw(trial)
        for attempt in range(TRIES):
            self.study.sampler = self.sampler(len(known), attempt)
            trial = self.study.ask()
            candidate = self.space.draw(trial)
            if candidate.key not in keys:
                return trial, candidate
            self.study.tell(trial, state=self.states.FAIL)  # the sampler looks at none of these
        return None

    def tell(self, trial: Any, found: Trial) -> None:
        """Keep what was measured."""
        kept = {key: value for key, value in asdict(found).items() if key not in ("number", "candidate")}
        trial.set_user_attr("measured", kept)
        if found.reason is not None:
            self.study.tell(trial, state=self.states.PRUNED)
        else:
            self.study.tell(trial, [found.ratio, found.fidelity])


class Tuner:
    """One run in progress."""

    def __init__(
        self, pipe: Any, plugins: Sequence[Plugin], settings: TuneSettings, folder: Path, judge: Judge | None, on_progress: OnProgress
    ) -> None:
        self.pipe = pipe
        self.plugins = {plugin.name: plugin for plugin in plugins}
        self.settings = settings
        self.folder = folder
        self.judge = judge
        self.on_progress = on_progress
        self.space = Space(plugins, settings.ladder)
        self.plain = Candidate(settings.steps)
        self.trials: list[Trial] = []
        self.started = time.monotonic()
        self.earlier = 0.0
        self.calibrating = 0.0
        self.unmade: dict[Path, str] = {}
        self.fetched: dict[tuple[str, str], dict[str, Any]] = {}
        self.made: dict[tuple[int, tuple[Sample, ...]], Pictures] = {}
        self.batch = 1 if any(plugin.effects.couples_batch for plugin in plugins) else settings.batch

    def spent(self) -> float:
        """Seconds so far, those of earlier attempts included."""
        return self.earlier + time.monotonic() - self.started

    def left(self) -> float:
        """Seconds that the search may still take; the end needs some too: of each side about half a plain call a round and a picture."""
        budget = self.settings.budget
        if budget is None:
            return math.inf
        plains = [seconds for trial in self.trials for seconds in trial.beside]
        sides = FINALISTS + 2
        end = sides * (self.settings.final_rounds + 1 + len(self.settings.held_out)) * 0.5 * statistics.median(plains) if plains else 0.0
        return budget - min(end, budget / 2) - self.spent()

    # running a candidate ----------------------------------------------------------------------------------------------------------------

    def artefact(self, plugin: Plugin, need: Need, steps: int) -> Path:
        """Where its artefact is; made where it is not there.

        Raises:
            Unsupported: that would take more than its share of the budget.
        """
        path = self.folder / f"{plugin.name}{f'-{steps}' if 'steps' in need.fits else ''}.safetensors"
        if path in self.unmade:
            raise Unsupported(self.unmade[path])
        if path.exists():
            return path
        single = {knob: values[0] for knob, values in self.space.tables[plugin.name].items() if len(values) == 1}
        limit, started = CALIBRATION_SHARE * (self.settings.budget or math.inf), time.monotonic()

        def watched(phase: str, done: int, total: int) -> None:
            self.on_progress(phase, done, total)
            expected = (time.monotonic() - started) * total / done
            if done < total and self.calibrating + expected > limit:
                self.unmade[path] = (
                    f"{plugin.name}: its artefact takes about {expected:.0f} s, and all artefacts may take {limit:.0f} s of the budget: "
                    f"make it beforehand with `diffgraft calibrate` and give -o {plugin.name}.{need.knob}=FILE, or give a longer --budget"
                )
                raise Unsupported(self.unmade[path])

        samples = self.settings.samples[:CALIBRATION_SAMPLES]
        try:
            call = replace(self.settings.call, steps=steps)
            calibrate(self.pipe, type(plugin)(**plugin.own_knobs, **single), samples, call, path, on_progress=watched)
        finally:
            self.calibrating += time.monotonic() - started
        return path

    def files(self, name: str, steps: int) -> dict[str, Path]:
        """The artefacts that were made for a plugin, by knob."""
        plugin = self.plugins[name]
        return {need.knob: self.artefact(plugin, need, steps) for need in plugin.needs if makes(plugin, need)}

    def build(self, candidate: Candidate) -> list[Plugin]:
        """Its plugins, with artefacts; files and second pipelines are read once a run."""
        built = []
        for name, knobs in candidate.plugins.items():
            files = self.files(name, candidate.steps)
            key = name, json.dumps(files, default=str)
            if key not in self.fetched:
                plugin = type(self.plugins[name])(**{**self.plugins[name].own_knobs, **files})
                live = {need.knob for need in plugin.needs if need.kind != "reward"}
                found = fetch(plugin, describe_here(self.pipe), {})
                self.fetched[key] = {knob: thing for knob, thing in found.items() if knob in live and thing is not None}
            built.append(type(self.plugins[name])(**{**knobs, **self.fetched[key]}))
        return built

    @contextmanager
    def grafted(self, candidate: Candidate) -> Iterator[CallSettings]:
        """The candidate's plugins are on; gives the settings of its calls."""
        stack = load_pipeline(self.pipe, self.build(candidate)).plugins if candidate.plugins else None
        try:
            yield replace(self.settings.call, steps=candidate.steps)
        finally:
            if stack is not None:
                stack.clear()

    def timed(self, candidate: Candidate, sample: Sample) -> tuple[float, list[str]]:
        """Seconds of one call with one sample, the device synchronised before and after; and what the plugins noted."""
        device = torch.device(self.pipe.device)
        with self.grafted(candidate) as call:
            synchronize(device)
            started = time.perf_counter()
            make_pictures(self.pipe, [sample], call)
            synchronize(device)
            seconds = time.perf_counter() - started
            parts = self.pipe.plugins.report().plugins if candidate.plugins else {}
        return seconds, [f"{name}: {note}" for name, part in parts.items() for note in part.notes]

    def pictures(self, candidate: Candidate, samples: tuple[Sample, ...]) -> Pictures:
        """Its pictures [n, frames, height, width, 3]; those of the plain pipeline are made once."""
        key = candidate.steps, samples
        if not candidate.plugins and key in self.made:
            return self.made[key]
        with self.grafted(candidate) as call:
            parts = [make_pictures(self.pipe, samples[i : i + self.batch], call) for i in range(0, len(samples), self.batch)]
        made = cast(Pictures, torch.cat([torch.from_numpy(part) for part in parts]).numpy())
        if not candidate.plugins:
            self.made[key] = made
        return made

    def values(self, candidate: Candidate, samples: tuple[Sample, ...]) -> list[float]:
        """Fidelity by picture."""
        measure, made = self.settings.goal.measure, self.pictures(candidate, samples)
        if measure == "judge":
            assert self.judge is not None
            try:
                raw = self.judge.score([as_seen(picture) for picture in made], [sample.prompt or "" for sample in samples])
            except ValueError as error:
                raise ConfigError(f"target judge: the judge does not understand a prompt: {error}; take psnr or ssim") from error
            return [float(right) for right in all_right(raw)]
        reference = self.pictures(Candidate(self.settings.reference_steps or self.settings.steps), samples)
        if made.shape != reference.shape:
            raise Unsupported(f"its pictures are of {made.shape[1:]}, those of the plain pipeline of {reference.shape[1:]}")
        if measure == "psnr":
            return [min(value, MOST_DB) for value in psnr(made, reference)]
        similar = ssim(made, reference)
        if similar is None:
            raise ConfigError(f"target ssim: pictures of {made.shape[2]} x {made.shape[3]} are smaller than its window; take psnr")
        return similar

    def measure(self, number: int, candidate: Candidate) -> Trial:
        """One trial. A plugin's refusal is its result; one of the plain pipeline is an error."""
        started = time.monotonic()
        seconds: list[float] = []
        beside: list[float] = []
        notes: list[str] = []
        samples = self.settings.samples
        try:
            values = self.values(candidate, samples)  # warms up as well
            self.timed(candidate, samples[0])
            for i in range(self.settings.rounds):
                sample = samples[i % len(samples)]
                pair = [self.plain, candidate] if i % 2 == 0 else [candidate, self.plain]
                times = {id(side): self.timed(side, sample) for side in pair}
                seconds.append(times[id(candidate)][0])
                beside.append(times[id(self.plain)][0])
                notes = times[id(candidate)][1]
        except DiffgraftError as error:
            if not candidate.plugins:
                raise
            return Trial(number, candidate, reason=f"{type(error).__name__}: {error}", spent=time.monotonic() - started)
        return Trial(number, candidate, seconds, beside, values, notes, None, time.monotonic() - started)

    def search(self, study: Study) -> bool:
        """Trials until time, number or space end; whether it was the space."""
        self.trials = study.known()
        self.earlier = math.fsum(trial.spent for trial in self.trials)
        settings = self.settings
        self.on_progress("reference", 0, 1)
        self.pictures(Candidate(settings.reference_steps or settings.steps), settings.samples)
        self.on_progress("reference", 1, 1)
        while (settings.trials is None or len(self.trials) < settings.trials) and (self.left() > 0 or not self.trials):
            asked = study.ask(self.trials)
            if asked is None:
                return True
            found = self.measure(len(self.trials), asked[1])
            study.tell(asked[0], found)
            self.trials.append(found)
            if settings.trials is not None:
                self.on_progress("search", len(self.trials), settings.trials)
            elif settings.budget is not None:
                self.on_progress("search", round(min(self.spent(), settings.budget)), round(settings.budget))
        return False

    # the end ----------------------------------------------------------------------------------------------------------------------------

    def finish(self, out: Path, name: str) -> tuple[list[Final], Final | None]:
        """The plain pipeline, fewer steps, and the fastest good stacks, on prompts that were not seen; and the winner."""
        goal, held_out = self.settings.goal, self.settings.held_out
        good = [trial for trial in front_of([t for t in self.trials if t.candidate.plugins]) if self.is_good(trial)]  # stacks' own front
        fewer = Candidate(self.fewest_steps())
        sides = [self.plain, fewer, *(trial.candidate for trial in good[:FINALISTS])]
        near = []
        for i, side in enumerate(sides):
            near.append(self.interval(self.values(side, held_out)))
            self.on_progress("pictures", i + 1, len(sides))
        rounds = self.rounds(sides)
        finals = []
        for i, side in enumerate(sides):
            kind: Literal["plain", "fewer_steps", "stack"] = "stack" if side.plugins else "fewer_steps" if i else "plain"
            against = Spread.of([b / s for b, s in zip(rounds[1], rounds[i], strict=True)]) if side.plugins else None
            faster = None if against is None or against.low <= 1 <= against.high else against.low > 1
            kept = self.keep(side, out)
            finals.append(
                Final(
                    kind=kind,
                    candidate=kept,
                    seconds=Spread.of(rounds[i]),
                    of_plain=Spread.of([s / b for s, b in zip(rounds[i], rounds[0], strict=True)]),
                    fidelity=near[i],
                    reaches=near[i].mean >= goal.value,
                    surely=not near[i].low < goal.value <= near[i].high,
                    against_fewer=against,
                    faster=faster,
                    ready=ready_line(name, kept, self.settings.call),
                )
            )
        winners = [final for final in finals if final.reaches and final.faster]
        return finals, min(winners, key=lambda final: final.of_plain.p50, default=None)

    def fewest_steps(self) -> int:
        """The smallest number of plain steps that reaches the goal on the held-out pictures, or the pipeline's own number."""
        plains = sorted(trial.candidate.steps for trial in self.trials if not trial.candidate.plugins and self.is_good(trial))
        hints = [*plains[:1], *(rung for rung in self.settings.ladder if plains and rung < plains[0])][:2]  # where the search saw it
        low, high = 0, self.settings.steps
        while high - low > 1:
            tried = next((hint for hint in hints if low < hint < high), (low + high) // 2)
            if statistics.fmean(self.values(Candidate(tried), self.settings.held_out)) >= self.settings.goal.value:
                high = tried
            else:
                low = tried
            self.on_progress("fewer steps", self.settings.steps - (high - low) + 1, self.settings.steps)
        return high

    def is_good(self, trial: Trial) -> bool:
        """Whether it reaches the goal on the prompts of the search."""
        return trial.reason is None and trial.fidelity >= self.settings.goal.value

    def rounds(self, sides: Sequence[Candidate]) -> list[list[float]]:
        """Seconds by side: a warm-up, then rounds of every side, every other one in reverse."""
        seconds: list[list[float]] = [[] for _ in sides]
        samples, total, done = self.settings.held_out, len(sides) * (self.settings.final_rounds + 1), 0
        for number in range(-1, self.settings.final_rounds):
            gc.collect()
            order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
            for i in order:
                took, _ = self.timed(sides[i], samples[max(number, 0) % len(samples)])
                if number >= 0:
                    seconds[i].append(took)
                done += 1
                self.on_progress("rounds", done, total)
        return seconds

    def interval(self, values: Sequence[float]) -> Mean:
        """Mean with its 95 % interval; of the judge a share with Wilson's."""
        if self.settings.goal.measure != "judge":
            return Mean.of(values)
        right = share([value > 0 for value in values])
        assert right is not None
        return Mean(right.share, right.low, right.high)

    def keep(self, candidate: Candidate, out: Path) -> Candidate:
        """The candidate with the artefacts that were made for it, which move to ``out``."""
        plugins = {}
        for name, knobs in candidate.plugins.items():
            files = self.files(name, candidate.steps)
            for path in files.values():
                write_atomic(out / path.name, path.read_bytes())
            plugins[name] = {**knobs, **{knob: str(out / path.name) for knob, path in files.items()}}
        return Candidate(candidate.steps, plugins)


__all__ = [
    "Candidate",
    "Final",
    "Goal",
    "Trial",
    "TuneSettings",
    "Tuning",
    "find_plugins",
    "front_of",
    "ladder_of",
    "parse_budget",
    "ready_line",
    "tune",
]
