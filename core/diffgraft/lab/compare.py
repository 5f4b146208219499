"""What do plugins buy, and what do they cost? Each plugin alone, the stack, and fewer steps at equal time, against the plain pipeline.

All arms run in one process on one pipeline with the same seeds and prompts. Latency: one sample a call, after warm-up calls, in
interleaved rounds (each runs every arm once, every other round in reverse). Fidelity: float pictures against those of the baseline. The
engine draws and prints nothing.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from diffgraft.installed.errors import ConfigError
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.defaults import own_defaults
from diffgraft.kernel.loading import load_pipeline
from diffgraft.kernel.stack import PluginStack, ensure_bare
from diffgraft.lab.figures import fidelity_of, fit_steps, latency_of, macs_of
from diffgraft.lab.instruments import DenoiseClock, MacCounter, synchronize
from diffgraft.lab.judging import Judge, as_seen, summarise, understood_by, verdicts_of
from diffgraft.lab.machine import machine, versions
from diffgraft.lab.results import (
    Arm,
    ArmResult,
    CompareSettings,
    Comparison,
    EqualTime,
    Kind,
    PartialArm,
    Timing,
    Unfinished,
    Verdicts,
)
from diffgraft.methods.extras import imported
from diffgraft.methods.inputs import CallSettings, Pictures, make_pictures
from diffgraft.stacks.report import Report

OnProgress = Callable[[str, int, int], None]
"""Called with (phase, calls done, calls in this phase)."""


def compare(
    pipe: Any,
    plugins: Sequence[Plugin],
    settings: CompareSettings,
    *,
    always: Sequence[str] = (),
    judge: Judge | None = None,
    attention_backend: str | None = None,
    on_progress: OnProgress | None = None,
    on_unfinished: Callable[[Unfinished], None] | None = None,
) -> Comparison:
    """Run every arm on a live pipeline; afterwards it is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        plugins: the stack, outermost first.
        always: names of those among them that are part of every arm, the baseline included: what do the others add on top of these?
        judge: scores pictures against prompts, or None.
        attention_backend: for all arms, the baseline included.
        on_progress: told of every call.
        on_unfinished: given what was measured when an exception or an interrupt ends it, before that goes on its way.

    Raises:
        ConfigError: no plugin, or a setting that this pipeline does not take.
        Conflict, Unsupported: the stack cannot be put on this pipeline; nothing was run.
    """
    names = [plugin.name for plugin in plugins]
    if strange := sorted(set(always) - set(names)):
        raise ConfigError(f"always = {', '.join(strange)}: not among the plugins that are compared ({', '.join(names) or 'none'})")
    if not set(names) - set(always):
        raise ConfigError("no plugin to compare: give at least one" + (" that is not part of every arm" if always else ""))
    imported("torchmetrics", "a comparison")
    ensure_bare(pipe, "the baseline must be without any")
    started = time.perf_counter()
    environment = {"versions": versions(), **machine(pipe.device), "dtype": str(pipe.dtype), "attention_backend": attention_backend}
    environment["call_defaults"] = dict(own_defaults(pipe))
    name = type(pipe).__name__
    with quiet(pipe):
        stack: PluginStack = load_pipeline(pipe, plugins, attention_backend=attention_backend).plugins
        try:
            warnings = list(stack.plan.warnings)
            bench = Bench(pipe, stack, settings, always, on_progress or (lambda phase, done, total: None))
            try:
                arms, equal_time, reference = bench.measure(judge)
            except BaseException as error:
                if on_unfinished is not None:
                    on_unfinished(bench.unfinished(error, name, environment, time.perf_counter() - started))
                raise
        finally:
            stack.clear()
    environment["load_after"] = machine(pipe.device)["load"]
    return Comparison(name, settings, bench.always, arms, equal_time, reference, environment, warnings, time.perf_counter() - started)


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline's own inside; its settings are put back."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


class Bench:
    """One comparison in progress."""

    def __init__(self, pipe: Any, stack: PluginStack, settings: CompareSettings, always: Sequence[str], on_progress: OnProgress) -> None:
        self.pipe = pipe
        self.stack = stack
        self.settings = settings
        self.on_progress = on_progress
        self.always = tuple(name for name in stack if name in always)
        self.names = tuple(name for name in stack if name not in always)
        self.device = torch.device(pipe.device)
        self.phase = self.during = "the beginning"
        self.arms: list[Arm] = []
        self.equal_time: EqualTime | None = None
        self.macs: list[int] = []
        self.timings: list[list[Timing]] = []
        self.pictures: list[Pictures] = []

    def measure(self, judge: Judge | None) -> tuple[list[ArmResult], EqualTime, Pictures | None]:
        """All phases: pilot, MACs, rounds, pictures, scores."""
        steps = self.settings.steps
        baseline = self.arm("baseline", "baseline", steps)
        own = self.settings.plugin_steps or steps
        grafted = [self.arm(name, "plugin", own, (name,)) for name in self.names]
        if len(self.names) > 1:
            grafted.append(self.arm(" + ".join(self.names), "stack", own, self.names))
        self.arms = [baseline, *grafted]
        equal_time = self.equal_time = self.find_equal_time(baseline, grafted[-1])
        fewer = self.arm(f"baseline, {equal_time.steps} steps", "fewer_steps", equal_time.steps)
        arms = self.arms = [baseline, *grafted, fewer]
        for arm in arms:
            self.macs.append(self.count_macs(arm, len(self.macs), len(arms)))
        self.run_rounds(arms)
        many = self.settings.reference_steps
        self.make_all([*arms, self.arm("reference", "baseline", many)] if many else arms)
        reference = self.pictures.pop() if many else None
        verdicts, judge_note = self.judge_all(judge, self.pictures)
        results = [self.result(arm, i, reference, verdicts) for i, arm in enumerate(arms)]
        if judge_note:
            results[0].notes.append(judge_note)
        target, found = results[-2].latency.seconds.p50, results[-1].latency.seconds.p50
        return results, replace(equal_time, realised=found / target), reference

    def arm(self, name: str, kind: Kind, steps: int, members: Sequence[str] = ()) -> Arm:
        knobs = {each: self.stack[each].config.model_dump() for each in self.stack if each in members or each in self.always}
        return Arm(name, kind, steps, knobs, tuple(members), all(self.stack[member].is_neutral for member in members))

    def unfinished(self, error: BaseException, pipeline: str, environment: dict[str, Any], seconds: float) -> Unfinished:
        """What there is when ``error`` ends the measurement."""
        whole = min(map(len, self.timings), default=0)
        done = dict(enumerate(self.pictures)) if self.settings.reference_steps is None else {}  # the reference comes last
        parts = [
            PartialArm(
                arm,
                timings := self.timings[i] if self.timings else [],
                latency_of(timings[:whole], self.timings[0][:whole]) if whole else None,
                self.macs[i] if i < len(self.macs) else None,
                fidelity_of(done[i], done[0]) if i in done else None,
            )
            for i, arm in enumerate(self.arms)
        ]
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        always, at = self.always, self.equal_time
        return Unfinished(pipeline, self.settings, always, self.during, text, whole, parts, at, environment, seconds)

    # calls ------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, arm: Arm) -> Iterator[CallSettings]:
        """The arm's plugins are on, the others off; gives the settings of its calls."""
        self.during = f"{self.phase}, {arm.name}"
        self.stack.disable()
        if arm.plugins:
            self.stack.enable(*arm.plugins)
        yield replace(self.settings.call, steps=arm.steps)

    def timed(self, arm: Arm, number: int) -> Timing:
        """See :meth:`called`."""
        return self.called(arm, number)[0]

    def called(self, arm: Arm, number: int) -> tuple[Timing, Pictures]:
        """One call with one sample, the device synchronised before and after."""
        index = number % len(self.settings.samples)
        with self.using(arm) as call:
            on_cuda = self.device.type == "cuda"
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            with DenoiseClock(self.stack, self.device) as clock:
                synchronize(self.device)
                started = time.perf_counter()
                pictures = make_pictures(self.pipe, [self.settings.samples[index]], call)
                synchronize(self.device)
                seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else None
            report = self.stack.report() if arm.plugins else None
        return Timing(number, index, seconds, clock.seconds(), peak, report), pictures

    # phases -----------------------------------------------------------------------------------------------------------------------

    def find_equal_time(self, baseline: Arm, target: Arm) -> EqualTime:
        """Pilot rounds of the baseline at all and at half its steps and of the target; the fastest of each counts."""
        self.phase = "pilot"
        n = baseline.steps
        half = replace(baseline, steps=max(1, n // 2))
        arms = {"baseline": baseline, "baseline at half the steps": half, "target": target}
        pilot: dict[str, list[float]] = {name: [] for name in arms}
        total = len(arms) * (self.settings.pilot + 1)
        for number in range(-1, self.settings.pilot):
            for i, (name, arm) in enumerate(arms.items()):
                seconds = self.timed(arm, max(number, 0)).seconds
                if number >= 0:  # the first round warms up
                    pilot[name].append(seconds)
                self.on_progress("pilot", (number + 1) * len(arms) + i + 1, total)
        whole, at_half, wanted = (min(values) for values in pilot.values())
        return fit_steps(n, whole, half.steps, at_half, wanted, target.name, pilot)

    def count_macs(self, arm: Arm, done: int, total: int) -> int:
        """Multiply-adds inside the denoiser(s) in one call."""
        self.phase = "MACs"
        with self.using(arm) as call, MacCounter(self.stack) as counter:
            make_pictures(self.pipe, [self.settings.samples[0]], call)
        self.on_progress("MACs", done + 1, total)
        return counter.macs

    def run_rounds(self, arms: Sequence[Arm]) -> None:
        """Warm-up, then interleaved rounds; timings by arm."""
        self.timings = [[] for _ in arms]
        total = len(arms) * (self.settings.warmup + self.settings.repeats)
        done = 0
        for number in range(-self.settings.warmup, self.settings.repeats):
            gc.collect()
            self.phase = f"latency, round {number + 1} of {self.settings.repeats}" if number >= 0 else "warm-up"
            order = range(len(arms)) if number % 2 == 0 else reversed(range(len(arms)))
            for i in order:
                timing = self.timed(arms[i], max(number, 0))
                if number >= 0:
                    self.timings[i].append(timing)
                done += 1
                self.on_progress("latency", done, total)

    def make_all(self, arms: Sequence[Arm]) -> None:
        """The fidelity pictures of every arm: all arms in batches of the same size."""
        self.phase = "pictures"
        samples = self.settings.samples
        coupled = any(self.stack[name].effects.couples_batch for name in self.names)
        batch = 1 if coupled else self.settings.batch
        for i, arm in enumerate(arms):
            parts = []
            with self.using(arm) as call:
                for start in range(0, len(samples), batch):
                    parts.append(make_pictures(self.pipe, samples[start : start + batch], call))
                    done = i * len(samples) + min(start + batch, len(samples))
                    self.on_progress("pictures", done, len(arms) * len(samples))
            self.pictures.append(np.concatenate(parts))

    def judge_all(self, judge: Judge | None, pictures: Sequence[Pictures]) -> tuple[list[Verdicts | None], str | None]:
        """The judge's verdicts by arm, and a note when it does not understand some prompts."""
        self.during = "the judge"
        if judge is None or any(sample.wanted is None for sample in self.settings.samples):
            return [None] * len(pictures), None
        prompts = [sample.wanted or "" for sample in self.settings.samples]
        understood, note = understood_by(judge, prompts, pictures[0])
        if not understood:
            return [None] * len(pictures), note
        raws = []
        for made in pictures:
            images = [as_seen(made[i]) for i in understood]
            raws.append(verdicts_of(judge, images, [prompts[i] for i in understood]))
        return [summarise(raw, raws[0]) for raw in raws], note

    # results ----------------------------------------------------------------------------------------------------------------------

    def result(
        self,
        arm: Arm,
        index: int,
        reference: Pictures | None,
        verdicts: Sequence[Verdicts | None],
    ) -> ArmResult:
        rounds, macs, pictures = self.timings, self.macs, self.pictures
        latency = latency_of(rounds[index], rounds[0])
        reports = [timing.report for timing in rounds[index] if timing.report is not None]
        skipped = {
            f"{name}: {key}": statistics.mean(report.plugins[name].total(key) for report in reports)
            for name in arm.plugins
            for key in sorted({key for report in reports for key in report.plugins[name].counts} - {"computed"})
        }
        unchanged = arm.kind in ("plugin", "stack") and np.array_equal(pictures[index], pictures[0])
        said = {name: [is_inactive(report, name) for report in reports] for name in arm.compared}
        notes = [f"{name}: {note}" for report in reports[:1] for name, part in report.plugins.items() for note in part.notes]
        return ArmResult(
            arm=arm,
            latency=latency,
            macs=macs_of(macs[index], macs[0], latency_of(rounds[0], rounds[0])),
            fidelity=fidelity_of(pictures[index], pictures[0] if reference is None else reference),
            verdicts=verdicts[index],
            skipped=skipped,
            denoiser_calls=statistics.mean(sum(report.denoiser_calls.values()) for report in reports) if reports else 0,
            changed_nothing=unchanged and not arm.neutral,
            notes=notes,
            inactive=tuple(name for name, rows in said.items() if rows and (all(rows) or (unchanged and any(rows)))),
            pictures=pictures[index],
        )


def is_inactive(report: Report, name: str) -> bool:
    """Whether a plugin said that it did nothing in a run."""
    return any(note.startswith("inactive") for note in report.plugins[name].notes)
