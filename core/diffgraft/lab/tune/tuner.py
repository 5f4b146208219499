"""The loop of a tuning: propose, measure, keep, and the finals on other prompts."""

from __future__ import annotations

import gc
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, DiffgraftError, Unsupported
from diffgraft.installed.plugin import Need, Plugin
from diffgraft.kernel.given import describe, fetch
from diffgraft.kernel.loading import load_pipeline
from diffgraft.lab.instruments import synchronize
from diffgraft.lab.judging import Judge, all_right, as_seen, verdicts_of
from diffgraft.lab.metrics import Mean, Spread, psnr, share, ssim
from diffgraft.lab.tune.goal import MOST_DB, Candidate, Final, Trial, TuneSettings, front_of, ready_line
from diffgraft.lab.tune.space import Space, makes
from diffgraft.lab.tune.study import Study
from diffgraft.methods.calibration import OnProgress, calibrate
from diffgraft.methods.files import write_atomic
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, make_pictures

FINALISTS = 3
LEAST_ROUNDS = 3
"""Rounds of the end that are timed however little time is left."""


SHORTER = ((3, 1.0, 1.0), (3, 0.0, 1.0), (2, 0.0, 1.0), (2, 0.0, 0.5), (1, 0.0, 0.5), (1, 0.0, 0.25), (1, 0.0, 0.0))
"""Ends by how long they take: finalists, share of the rounds, share of the pictures; never less than ``LEAST_ROUNDS`` and a picture."""
CALIBRATION_SAMPLES = 8


CALIBRATION_SHARE = 0.25
"""The most of a budget that goes into artefacts, all plugins together."""


def describe_here(pipe: Any) -> Any:
    """What a plugin's check may look at, of a pipeline without plugins."""
    return describe(pipe, registry.find_family(type(pipe)))


class Tuner:
    """One run in progress."""

    def __init__(
        self,
        pipe: Any,
        plugins: Sequence[Plugin],
        settings: TuneSettings,
        folder: Path,
        judge: Judge | None,
        on_progress: OnProgress,
        started: float | None = None,
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
        self.started = time.monotonic() if started is None else started
        self.earlier = 0.0
        self.calibrating = 0.0
        self.pace = 0.0
        """Seconds of the plain pipeline for a step of one picture among several."""
        self.unmade: dict[Path, str] = {}
        self.fetched: dict[tuple[str, str], dict[str, Any]] = {}
        self.made: dict[tuple[int, tuple[Sample, ...]], Pictures] = {}
        self.batch = 1 if any(plugin.effects.couples_batch for plugin in plugins) else settings.batch

    def spent(self) -> float:
        """Seconds so far, those of earlier attempts included."""
        return self.earlier + time.monotonic() - self.started

    def left(self) -> float:
        """Seconds that the search may still take: what the end needs is kept back, at most half of the budget."""
        budget = self.settings.budget
        if budget is None:
            return math.inf
        return budget - min(self.end_cost(self.settings, FINALISTS), budget / 2) - self.spent()

    def end_cost(self, settings: TuneSettings, finalists: int) -> float:
        """Seconds that the end takes, going by what the plain pipeline took so far: stacks count like it with its own steps."""
        plains = [seconds for trial in self.trials for seconds in trial.beside]
        call = statistics.median(plains) if plains else self.pace * settings.steps
        gap = max(a - b for a, b in pairwise((*settings.ladder, 0)))  # between two rungs the fewest steps are searched by halving
        steps = (settings.reference_steps or 0) + settings.steps * (1 + (2 + math.log2(max(gap, 2))) / 2 + finalists)
        return self.pace * len(settings.held_out) * steps + call * (settings.final_rounds + 1) * (finalists + 2)

    def ensure_enough(self) -> None:
        """Raises ConfigError when the budget is too short for a trial of a stack and the shortest end."""
        whole = self.settings
        if whole.budget is None:
            return
        trial = self.pace * whole.steps * (len(whole.samples) + 1 + 2 * whole.rounds)
        least = self.spent() + 2 * trial + self.end_cost(self.shortened(*SHORTER[-1][1:]), SHORTER[-1][0])
        if least > whole.budget:
            raise ConfigError(
                f"budget {whole.budget:.3g} s: the plain pipeline takes about {self.pace * whole.steps:.2g} s a picture; itself, one "
                f"stack and the shortest end take about {least:.0f} s: give twice that, fewer prompts or steps, or --trials N alone"
            )

    def shortened(self, rounds: float, part: float) -> TuneSettings:
        """The settings with this share of the rounds and of the pictures of the end."""
        whole = self.settings
        return replace(
            whole,
            final_rounds=max(round(whole.final_rounds * rounds), min(LEAST_ROUNDS, whole.final_rounds)),
            held_out=whole.held_out[: max(1, round(len(whole.held_out) * part))],
        )

    def shorten_end(self) -> int:
        """Makes the end as small as the time that is left asks for: fewer rounds, then fewer finalists, then fewer pictures.

        Returns:
            how many finalists there may be.
        """
        if self.settings.budget is None:
            return FINALISTS
        for finalists, rounds, part in SHORTER:
            shorter = self.shortened(rounds, part)
            if self.end_cost(shorter, finalists) <= self.settings.budget - self.spent():
                break
        self.settings = shorter
        return finalists

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
        limit = min(limit, self.calibrating + max(self.left(), 0.0))

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
        started = time.monotonic()
        with self.grafted(candidate) as call:
            parts = [make_pictures(self.pipe, samples[i : i + self.batch], call) for i in range(0, len(samples), self.batch)]
        made: Pictures = np.concatenate(parts)
        if not candidate.plugins:
            self.made[key] = made
            if candidate.steps >= self.settings.steps:
                self.pace = (time.monotonic() - started) / (len(samples) * candidate.steps)
        return made

    def values(self, candidate: Candidate, samples: tuple[Sample, ...]) -> list[float]:
        """Fidelity by picture."""
        measure, made = self.settings.goal.measure, self.pictures(candidate, samples)
        if measure == "judge":
            assert self.judge is not None
            try:
                raw = verdicts_of(self.judge, [as_seen(picture) for picture in made], [sample.wanted or "" for sample in samples])
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
        settings, samples = self.settings, self.settings.samples
        try:
            took, _ = self.timed(candidate, samples[0])  # warms up, and tells whether there is time for more
            expected = took * (len(samples) + settings.rounds)
            if candidate.plugins and expected > (left := self.left()):
                raise Unsupported(f"its trial takes about {expected:.0f} s, and {max(left, 0):.0f} s of the budget are left for the search")
            values = self.values(candidate, samples)
            for i in range(settings.rounds):
                sample = samples[i % len(samples)]
                pair = [self.plain, candidate] if i % 2 == 0 else [candidate, self.plain]
                pair = pair[:1] if candidate == self.plain else pair  # it is not timed beside itself
                times = {side.key: self.timed(side, sample) for side in pair}
                seconds.append(times[candidate.key][0])
                beside.append(times[self.plain.key][0])
                notes = times[candidate.key][1]
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
        if not self.trials:
            self.ensure_enough()
        while (settings.trials is None or len(self.trials) < settings.trials) and (not self.trials or self.left() > self.next_trial()):
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

    def next_trial(self) -> float:
        """Seconds that the next trial takes, if it is like the last ones."""
        return statistics.median(trial.spent for trial in self.trials[-5:])

    # the end ----------------------------------------------------------------------------------------------------------------------------

    def finish(self, out: Path, name: str) -> tuple[list[Final], Final | None]:
        """The plain pipeline, fewer steps, and the fastest good stacks, on prompts that were not seen; and the winner."""
        finalists = self.shorten_end()
        goal = self.settings.goal
        plains = [self.plain, Candidate(self.fewest_steps())]
        stacks = self.finalists(finalists)
        sides = [*plains, *(trial.candidate for trial, _ in stacks)]
        near = [*map(self.unseen, plains), *(fidelity for _, fidelity in stacks)]
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

    def finalists(self, most: int) -> list[tuple[Trial, Mean]]:
        """The fastest good stacks of the stacks' own front, and how near they are on pictures that the search has not seen.

        One that refuses such a prompt is a refused trial like any other, and the next one moves up.
        """
        near: dict[int, Mean] = {}
        while True:
            front = [trial for trial in front_of([t for t in self.trials if t.candidate.plugins]) if self.is_good(trial)][:most]
            trial = next((trial for trial in front if trial.number not in near), None)
            if trial is None:
                return [(trial, near[trial.number]) for trial in front]
            try:
                near[trial.number] = self.unseen(trial.candidate)
            except DiffgraftError as error:
                self.trials[trial.number] = replace(trial, reason=f"on a prompt of the end: {type(error).__name__}: {error}")
            self.on_progress("pictures", len(near), len(front))

    def unseen(self, candidate: Candidate) -> Mean:
        """Fidelity on the held-out pictures."""
        return self.interval(self.values(candidate, self.settings.held_out))

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
        one_round, samples, total, done = 0.0, self.settings.held_out, len(sides) * (self.settings.final_rounds + 1), 0
        budget = self.settings.budget or math.inf
        for number in range(-1, self.settings.final_rounds):
            begun = time.monotonic()
            if number >= LEAST_ROUNDS and self.spent() + one_round > budget:
                self.settings = replace(self.settings, final_rounds=number)
                break
            gc.collect()
            order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
            for i in order:
                took, _ = self.timed(sides[i], samples[max(number, 0) % len(samples)])
                if number >= 0:
                    seconds[i].append(took)
                done += 1
                self.on_progress("rounds", done, total)
            one_round = time.monotonic() - begun
        return seconds

    def interval(self, values: Sequence[float]) -> Mean:
        """Mean with its 95 % interval; of the judge a share with Wilson's."""
        if self.settings.goal.measure != "judge":
            return Mean.of(values)
        right = share([value > 0 for value in values])
        assert right is not None
        return Mean(right.share, right.low, right.high, right.total)

    def keep(self, candidate: Candidate, out: Path) -> Candidate:
        """The candidate with the artefacts that were made for it, which move to ``out``."""
        plugins = {}
        for name, knobs in candidate.plugins.items():
            files = self.files(name, candidate.steps)
            for path in files.values():
                write_atomic(out / path.name, path.read_bytes())
            plugins[name] = {**knobs, **{knob: str(out / path.name) for knob, path in files.items()}}
        return Candidate(candidate.steps, plugins)
