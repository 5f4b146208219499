"""What do plugins buy, and what do they cost? Each plugin alone, the stack, and fewer steps at equal time, against the plain pipeline.

All arms run in one process on one pipeline with the same seeds and prompts. Latency: one sample a call, after warm-up calls, in
interleaved rounds (each runs every arm once, every other round in reverse). Fidelity: float pictures against those of the baseline. The
engine draws and prints nothing.
"""

from __future__ import annotations

import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import torch

from diffgraft.kernel.errors import BrokenPlugin, ConfigError
from diffgraft.kernel.family import Bundled
from diffgraft.kernel.loading import load_pipeline
from diffgraft.kernel.plugin import Plugin
from diffgraft.kernel.report import Report
from diffgraft.kernel.stack import PluginStack, ensure_bare
from diffgraft.lab.instruments import DenoiseClock, MacCounter, synchronize
from diffgraft.lab.machine import machine, versions
from diffgraft.lab.metrics import Mean, Share, Spread, psnr, share, ssim
from diffgraft.lab.pictures import to_images
from diffgraft.methods.inputs import CallSettings, Pictures, Sample, make_pictures

SCHEMA = 1
"""Number of the layout of ``compare.json``."""

METHOD = {
    "latency": "whole pipe(...) call, one sample, wall clock with the device synchronised; warm-up calls first; rounds run every arm once, "
    "every other round in reverse order, all arms of a round with the same prompt and seed",
    "denoise": "the part of a call between the first denoiser call's start and the last one's end (schedulers' steps in between included)",
    "speedup.of_medians": "median seconds of the baseline / median seconds of the arm",
    "speedup.paired": "per round: seconds of the baseline / seconds of the arm",
    "macs": "multiply-adds of one run inside the denoiser(s): FLOPs by torch's formulas / 2 (matrix products, convolutions, attention; "
    "element-wise work and custom kernels are not seen)",
    "macs.limit": "MACs of the baseline / MACs of the arm: the speed-up of the denoiser if time went with MACs; limit_whole_call adds the "
    "baseline's measured time outside the denoise part",
    "fidelity": "PSNR (dB) and SSIM (Gaussian window 11) of each float picture to the reference's (the baseline with `reference_steps` "
    "steps where that is given, else the baseline itself), data range 1; equal ones count in `identical`, PSNR's mean is over the others",
    "advantage": "mean over the pictures of the stack's PSNR minus that of fewer steps at equal time, with its 95 % bootstrap interval",
    "fewer_steps": "the baseline with the step count whose time is nearest to the stack's: "
    "linear fit through pilot runs at all and at half the steps",
    "judge": "shares of right verdicts with 95 % Wilson intervals; `all` = everything that the prompt asks for is right",
}


class Judge(Protocol):
    """Says for each picture whether it shows what its prompt asks for: a list of verdicts for each thing (None: the prompt is silent)."""

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[bool | None]]: ...


OnProgress = Callable[[str, int, int], None]
"""Called with (phase, calls done, calls in this phase)."""


@dataclass(frozen=True)
class CompareSettings:
    """What to run.

    samples   the pictures of the fidelity figures; latency rounds take them in turn
    steps     denoising steps of every arm but "fewer steps"
    call      what all calls share (guidance scale, size...)
    repeats   latency rounds
    warmup    calls of every arm before the rounds
    pilot     rounds that find the step count of equal time
    batch     samples in one call for the fidelity pictures (1 when a plugin couples the samples of a batch)
    reference_steps  steps of the plain pipeline whose pictures are the measure of fidelity, for methods that change the sampling; None: the
                     baseline's pictures
    """

    samples: tuple[Sample, ...]
    steps: int
    call: CallSettings = field(default_factory=CallSettings)
    repeats: int = 7
    warmup: int = 2
    pilot: int = 3
    batch: int = 1
    reference_steps: int | None = None

    def __post_init__(self) -> None:
        limits = {"steps": 1, "repeats": 1, "warmup": 0, "pilot": 1, "batch": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be >= {least}")
        if self.reference_steps is not None and self.reference_steps <= self.steps:
            raise ConfigError(f"reference_steps = {self.reference_steps}: must be more than the {self.steps} steps that are compared")
        if not self.samples:
            raise ConfigError("nothing to compare: give at least one prompt or seed")


Kind = Literal["baseline", "plugin", "stack", "fewer_steps"]


@dataclass(frozen=True)
class Arm:
    """One side of the comparison. ``plugins``: knobs in force by name, outermost first; ``neutral``: those that are compared are set to
    change nothing."""

    name: str
    kind: Kind
    steps: int
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    neutral: bool = False


@dataclass(frozen=True)
class Timing:
    """One timed call. ``denoise_seconds`` None where there is no clock for it; ``peak_bytes`` on CUDA only; ``report`` of the plugins."""

    round: int
    sample: int
    seconds: float
    denoise_seconds: float | None
    peak_bytes: int | None
    report: Report | None


@dataclass(frozen=True)
class Latency:
    """Seconds of the whole call and of its denoise part, and the ratios to the baseline."""

    seconds: Spread
    denoise: Spread | None
    of_medians: float
    denoise_of_medians: float | None
    paired: Spread
    peak_bytes: int | None
    rounds: list[Timing]


@dataclass(frozen=True)
class Macs:
    """Multiply-adds in the denoiser(s) in one run, the speed-up that they allow there, and for the whole call (None: not known)."""

    per_run: int
    limit: float
    limit_whole_call: float | None


@dataclass(frozen=True)
class Fidelity:
    """Nearness to the reference's pictures, per picture. Means and worsts are over the pictures that differ (None: none does)."""

    identical: int
    pictures: int
    psnr_mean: float | None
    psnr_worst: float | None
    ssim_mean: float | None
    ssim_worst: float | None
    psnr: list[float]
    ssim: list[float] | None


@dataclass(frozen=True)
class Verdicts:
    """The judge's scores of one arm: shares by field, raw verdicts, and how many pictures are right (gained) or wrong (lost) only here,
    not in the baseline."""

    shares: dict[str, Share]
    raw: dict[str, list[bool | None]]
    gained: int
    lost: int


@dataclass
class ArmResult:
    """All that was measured of one arm."""

    arm: Arm
    latency: Latency
    macs: Macs
    fidelity: Fidelity
    verdicts: Verdicts | None
    skipped: dict[str, float]
    """Mean counters of the plugins in a run ("deepcache: skipped"), but for what they computed."""
    denoiser_calls: float
    """Mean number of denoiser calls that the pipeline asked for in a run (0: not counted)."""
    changed_nothing: bool
    notes: list[str]
    """What the plugins said in the first round (the reports of all rounds are in ``latency.rounds``)."""
    pictures: Pictures


@dataclass(frozen=True)
class EqualTime:
    """How the step count of the "fewer steps" arm was found: seconds = ``fixed`` + ``per_step`` * steps = ``target`` gives ``steps``.

    ``realised`` median seconds of that arm / of the stack in the rounds; ``capped``: the stack is not faster, so it is the baseline itself.
    """

    matched_to: str
    steps: int
    fixed: float
    per_step: float
    target: float
    capped: bool
    realised: float
    pilot: dict[str, list[float]]

    def __str__(self) -> str:
        fit = f"{self.fixed * 1e3:.0f} ms + {self.per_step * 1e3:.1f} ms a step"
        if self.capped:
            return (
                f"{self.matched_to} ({self.target:.3f} s) is not faster than the baseline ({fit}): "
                f"equal time is the baseline's own {self.steps} steps"
            )
        return (
            f"a baseline run takes {fit}, so the {self.target:.3f} s of {self.matched_to} buy {self.steps} steps; "
            f"in the rounds they took {self.realised:.2f} x its time"
        )


@dataclass(frozen=True)
class Product:
    """What a stack would gain if its parts did not meet, the gains of each alone multiplied, beside what it gains."""

    speedup_of_parts: float
    speedup: float
    macs_limit_of_parts: float
    macs_limit: float

    def __str__(self) -> str:
        return (
            f"the parts' speed-ups multiplied: {self.speedup_of_parts:.2f}x (MAC limits {self.macs_limit_of_parts:.2f}x); "
            f"the stack: {self.speedup:.2f}x (MAC limit {self.macs_limit:.2f}x)"
        )


@dataclass
class Comparison:
    """The result; ``to_json`` gives all raw numbers (pictures apart)."""

    pipeline: str
    settings: CompareSettings
    always: tuple[str, ...]
    """Plugins that are part of every arm, the baseline included."""
    arms: list[ArmResult]
    equal_time: EqualTime
    reference: Pictures | None
    """The plain pipeline's pictures with ``settings.reference_steps``."""
    environment: dict[str, Any]
    warnings: list[str]
    seconds: float

    def arm(self, name: str) -> ArmResult:
        """The arm of this name."""
        return next(result for result in self.arms if result.arm.name == name)

    @property
    def product(self) -> Product | None:
        """The product of the parts of a stack; None for a single plugin."""
        parts = [result for result in self.arms if result.arm.kind == "plugin"]
        whole = next((result for result in self.arms if result.arm.kind == "stack"), None)
        if whole is None:
            return None
        speedups = (math.prod(part.latency.of_medians for part in parts), whole.latency.of_medians)
        return Product(*speedups, math.prod(part.macs.limit for part in parts), whole.macs.limit)

    @property
    def advantage(self) -> Mean | None:
        """By how many dB the stack's pictures are nearer to the reference's than those of fewer steps in the same time; None where they
        (or the baseline's, that they are compared with) are equal."""
        stack, fewer = (result.fidelity for result in self.arms[-2:])
        pairs = [a - b for a, b in zip(stack.psnr, fewer.psnr, strict=True) if math.isfinite(a) and math.isfinite(b)]
        return Mean.of(pairs) if pairs else None

    def to_json(self) -> dict[str, Any]:
        """Plain lists, numbers and texts; an infinite number (PSNR of equal pictures) becomes None."""
        derived = {"product": plain(self.product), "advantage": plain(self.advantage)}
        return {"schema": SCHEMA, "method": METHOD, **plain(self), **derived}


def compare(
    pipe: Any,
    plugins: Sequence[Plugin],
    settings: CompareSettings,
    *,
    always: Sequence[str] = (),
    judge: Judge | None = None,
    attention_backend: str | None = None,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Run every arm on a live pipeline; afterwards it is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        plugins: the stack, outermost first.
        always: names of those among them that are part of every arm, the baseline included: what do the others add on top of these?
        judge: scores pictures against prompts, or None.
        attention_backend: for all arms, the baseline included.
        on_progress: told of every call.

    Raises:
        ConfigError: no plugin, or a setting that this pipeline does not take.
        Conflict, Unsupported: the stack cannot be put on this pipeline; nothing was run.
    """
    names = [plugin.name for plugin in plugins]
    if strange := sorted(set(always) - set(names)):
        raise ConfigError(f"always = {', '.join(strange)}: not among the plugins that are compared ({', '.join(names) or 'none'})")
    if not set(names) - set(always):
        raise ConfigError("no plugin to compare: give at least one" + (" that is not part of every arm" if always else ""))
    ensure_bare(pipe, "the baseline must be without any")
    started = time.perf_counter()
    environment = {"versions": versions(), **machine(pipe.device), "dtype": str(pipe.dtype), "attention_backend": attention_backend}
    with quiet(pipe):
        stack: PluginStack = load_pipeline(pipe, plugins, attention_backend=attention_backend).plugins
        try:
            warnings = list(stack.plan.warnings)
            bench = Bench(pipe, stack, settings, always, on_progress or (lambda phase, done, total: None))
            arms, equal_time, reference = bench.measure(judge)
        finally:
            stack.clear()
    environment["load_after"] = machine(pipe.device)["load"]
    name = type(pipe).__name__
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

    def __init__(
        self, pipe: Any, stack: PluginStack, settings: CompareSettings, always: Sequence[str], on_progress: OnProgress
    ) -> None:
        self.pipe = pipe
        self.stack = stack
        self.settings = settings
        self.on_progress = on_progress
        self.always = tuple(name for name in stack if name in always)
        self.names = tuple(name for name in stack if name not in always)
        self.device = torch.device(pipe.device)

    def measure(self, judge: Judge | None) -> tuple[list[ArmResult], EqualTime, Pictures | None]:
        """All phases: pilot, MACs, rounds, pictures, scores."""
        steps = self.settings.steps
        baseline = self.arm("baseline", "baseline", steps)
        grafted = [self.arm(name, "plugin", steps, (name,)) for name in self.names]
        if len(self.names) > 1:
            grafted.append(self.arm(" + ".join(self.names), "stack", steps, self.names))
        equal_time = self.find_equal_time(baseline, grafted[-1])
        fewer = self.arm(f"baseline, {equal_time.steps} steps", "fewer_steps", equal_time.steps)
        arms = [baseline, *grafted, fewer]
        macs = [self.count_macs(arm, i, len(arms)) for i, arm in enumerate(arms)]
        rounds = self.run_rounds(arms)
        many = self.settings.reference_steps
        pictures = self.make_all([*arms, self.arm("reference", "baseline", many)] if many else arms)
        reference = pictures.pop() if many else None
        verdicts, judge_note = self.judge_all(judge, pictures)
        results = [self.result(arm, i, rounds, macs, pictures, reference, verdicts) for i, arm in enumerate(arms)]
        if judge_note:
            results[0].notes.append(judge_note)
        target, found = results[-2].latency.seconds.p50, results[-1].latency.seconds.p50
        return results, replace(equal_time, realised=found / target), reference

    def arm(self, name: str, kind: Kind, steps: int, members: Sequence[str] = ()) -> Arm:
        knobs = {each: self.stack[each].config.model_dump() for each in self.stack if each in members or each in self.always}
        return Arm(name, kind, steps, knobs, all(is_neutral(self.stack[member]) for member in members))

    # calls ------------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, arm: Arm) -> Iterator[CallSettings]:
        """The arm's plugins are on, the others off; gives the settings of its calls."""
        self.stack.disable()
        if arm.plugins:
            self.stack.enable(*arm.plugins)
        yield replace(self.settings.call, steps=arm.steps)

    def timed(self, arm: Arm, number: int) -> Timing:
        """One call with one sample, the device synchronised before and after."""
        index = number % len(self.settings.samples)
        with self.using(arm) as call:
            on_cuda = self.device.type == "cuda"
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(self.device)
            with DenoiseClock(self.stack, self.device) as clock:
                synchronize(self.device)
                started = time.perf_counter()
                make_pictures(self.pipe, [self.settings.samples[index]], call)
                synchronize(self.device)
                seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_allocated(self.device) if on_cuda else None
            report = self.stack.report() if arm.plugins else None
        return Timing(number, index, seconds, clock.seconds(), peak, report)

    # phases -----------------------------------------------------------------------------------------------------------------------

    def find_equal_time(self, baseline: Arm, target: Arm) -> EqualTime:
        """Pilot rounds of the baseline at all and at half its steps and of the target; the fastest of each counts."""
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
        with self.using(arm) as call, MacCounter(self.stack) as counter:
            make_pictures(self.pipe, [self.settings.samples[0]], call)
        self.on_progress("MACs", done + 1, total)
        return counter.macs

    def run_rounds(self, arms: Sequence[Arm]) -> list[list[Timing]]:
        """Warm-up, then interleaved rounds; timings by arm."""
        timings: list[list[Timing]] = [[] for _ in arms]
        total = len(arms) * (self.settings.warmup + self.settings.repeats)
        done = 0
        for number in range(-self.settings.warmup, self.settings.repeats):
            gc.collect()
            order = range(len(arms)) if number % 2 == 0 else reversed(range(len(arms)))
            for i in order:
                timing = self.timed(arms[i], max(number, 0))
                if number >= 0:
                    timings[i].append(timing)
                done += 1
                self.on_progress("latency", done, total)
        return timings

    def make_all(self, arms: Sequence[Arm]) -> list[Pictures]:
        """The fidelity pictures of every arm: all arms in batches of the same size."""
        samples = self.settings.samples
        coupled = any(self.stack[name].effects.couples_batch for name in self.names)
        batch = 1 if coupled else self.settings.batch
        made = []
        for i, arm in enumerate(arms):
            parts = []
            with self.using(arm) as call:
                for start in range(0, len(samples), batch):
                    parts.append(make_pictures(self.pipe, samples[start : start + batch], call))
                    done = i * len(samples) + min(start + batch, len(samples))
                    self.on_progress("pictures", done, len(arms) * len(samples))
            made.append(np.concatenate(parts))
        return made

    def judge_all(self, judge: Judge | None, pictures: Sequence[Pictures]) -> tuple[list[Verdicts | None], str | None]:
        """The judge's verdicts by arm, and a note when it does not understand some prompts."""
        if judge is None or any(sample.prompt is None for sample in self.settings.samples):
            return [None] * len(pictures), None
        prompts = [sample.prompt or "" for sample in self.settings.samples]
        understood, note = understood_by(judge, prompts, pictures[0])
        if not understood:
            return [None] * len(pictures), note
        raws = []
        for made in pictures:
            images = [as_seen(made[i]) for i in understood]
            raws.append(judge.score(images, [prompts[i] for i in understood]))
        return [summarise(raw, raws[0]) for raw in raws], note

    # results ----------------------------------------------------------------------------------------------------------------------

    def result(
        self,
        arm: Arm,
        index: int,
        rounds: Sequence[list[Timing]],
        macs: Sequence[int],
        pictures: Sequence[Pictures],
        reference: Pictures | None,
        verdicts: Sequence[Verdicts | None],
    ) -> ArmResult:
        latency = latency_of(rounds[index], rounds[0])
        reports = [timing.report for timing in rounds[index] if timing.report is not None]
        skipped = {
            f"{name}: {key}": statistics.mean(report.plugins[name].total(key) for report in reports)
            for name in arm.plugins
            for key in sorted({key for report in reports for key in report.plugins[name].counts} - {"computed"})
        }
        notes = [f"{name}: {note}" for report in reports[:1] for name, part in report.plugins.items() for note in part.notes]
        return ArmResult(
            arm=arm,
            latency=latency,
            macs=macs_of(macs[index], macs[0], latency_of(rounds[0], rounds[0])),
            fidelity=fidelity_of(pictures[index], pictures[0] if reference is None else reference),
            verdicts=verdicts[index],
            skipped=skipped,
            denoiser_calls=statistics.mean(sum(report.denoiser_calls.values()) for report in reports) if reports else 0,
            changed_nothing=arm.kind in ("plugin", "stack") and not arm.neutral and np.array_equal(pictures[index], pictures[0]),
            notes=notes,
            pictures=pictures[index],
        )


def is_neutral(plugin: Plugin) -> bool:
    """Whether a plugin is set to change nothing."""
    neutral = type(plugin).neutral
    return bool(neutral) and all(getattr(plugin.config, knob) == value for knob, value in neutral.items())


def fit_steps(n: int, whole: float, half: int, at_half: float, target: float, matched_to: str, pilot: dict[str, list[float]]) -> EqualTime:
    """The step count whose time is nearest to ``target``, on the line through (n, whole) and (half, at_half)."""
    per_step = (whole - at_half) / (n - half) if n > half else 0.0
    if per_step <= 0 or per_step * n > whole:  # noise, or a single step
        per_step = whole / n
    fixed = whole - per_step * n
    wanted = round((target - fixed) / per_step)
    return EqualTime(matched_to, min(max(wanted, 1), n), fixed, per_step, target, wanted >= n, math.nan, pilot)


def latency_of(timings: Sequence[Timing], baseline: Sequence[Timing]) -> Latency:
    """Spreads and ratios of one arm's rounds."""
    seconds = Spread.of([t.seconds for t in timings])
    base = Spread.of([t.seconds for t in baseline])
    denoise, base_denoise = denoise_spread(timings), denoise_spread(baseline)
    peaks = [t.peak_bytes for t in timings if t.peak_bytes is not None]
    return Latency(
        seconds=seconds,
        denoise=denoise,
        of_medians=base.p50 / seconds.p50,
        denoise_of_medians=base_denoise.p50 / denoise.p50 if denoise and base_denoise else None,
        paired=Spread.of([b.seconds / t.seconds for b, t in zip(baseline, timings, strict=True)]),
        peak_bytes=max(peaks) if peaks else None,
        rounds=list(timings),
    )


def denoise_spread(timings: Sequence[Timing]) -> Spread | None:
    values = [t.denoise_seconds for t in timings if t.denoise_seconds is not None]
    return Spread.of(values) if len(values) == len(timings) else None


def macs_of(macs: int, baseline: int, latency: Latency) -> Macs:
    """The limit that MACs set; ``latency`` is the baseline's, which says how much of a call is not denoising."""
    limit = baseline / macs if macs else math.inf
    if latency.denoise is None:
        return Macs(macs, limit, None)
    outside = max(0.0, latency.seconds.p50 - latency.denoise.p50)
    shortest = outside + latency.denoise.p50 / limit
    return Macs(macs, limit, latency.seconds.p50 / shortest if shortest else math.inf)


def fidelity_of(pictures: Pictures, reference: Pictures) -> Fidelity:
    """Nearness of an arm's pictures to the reference's."""
    if pictures.shape != reference.shape:
        raise ConfigError(f"pictures of {pictures.shape[1:]} cannot be compared with the reference's {reference.shape[1:]}")
    ratios = psnr(pictures, reference)
    similar = ssim(pictures, reference)
    differing = [i for i in range(len(ratios)) if not np.array_equal(pictures[i], reference[i])]
    return Fidelity(
        identical=len(ratios) - len(differing),
        pictures=len(ratios),
        psnr_mean=statistics.mean(ratios[i] for i in differing) if differing else None,
        psnr_worst=min(ratios[i] for i in differing) if differing else None,
        ssim_mean=statistics.mean(similar[i] for i in differing) if differing and similar else None,
        ssim_worst=min(similar[i] for i in differing) if differing and similar else None,
        psnr=ratios,
        ssim=similar,
    )


def as_seen(frames: Pictures) -> Any:
    """A PIL picture, or the list of a video's frames."""
    images = to_images(frames)
    return images[0] if len(images) == 1 else images


def understood_by(judge: Judge, prompts: Sequence[str], pictures: Pictures) -> tuple[list[int], str | None]:
    """Which prompts the judge can read, and a note about those it cannot (it raises ValueError)."""
    understood, fault = [], None
    for i, prompt in enumerate(prompts):
        try:
            judge.score([as_seen(pictures[i])], [prompt])
            understood.append(i)
        except ValueError as error:
            fault = fault or str(error)
    missed = len(prompts) - len(understood)
    return understood, f"the judge does not understand {missed} of {len(prompts)} prompts: {fault}" if fault else None


def summarise(raw: dict[str, list[bool | None]], baseline: dict[str, list[bool | None]]) -> Verdicts:
    """Shares by field and for all fields together."""
    together, before = all_right(raw), all_right(baseline)
    shares = {name: found for name, row in raw.items() if (found := share(row)) is not None}
    if (everything := share(together)) is not None:
        shares["all"] = everything
    gained = sum(now and not then for now, then in zip(together, before, strict=True))
    lost = sum(then and not now for now, then in zip(together, before, strict=True))
    return Verdicts(shares, raw, gained, lost)


def all_right(raw: dict[str, list[bool | None]]) -> list[bool]:
    """By picture: nothing that the prompt asks for is wrong."""
    return [all(verdict is not False for verdict in verdicts) for verdicts in zip(*raw.values(), strict=True)]


def load_judge(bundled: Bundled) -> Judge | None:
    """The judge of a bundled checkpoint, or None when it has none.

    Raises:
        BrokenPlugin: it names one that cannot be loaded.
    """
    if bundled.judge is None:
        return None
    module, _, function = bundled.judge.partition(":")
    try:
        judge: Judge = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, OSError) as error:
        raise BrokenPlugin(f"the judge of {bundled.name!r} ({bundled.judge}) cannot be loaded: {type(error).__name__}: {error}") from error
    return judge


def plain(value: Any) -> Any:
    """Dataclasses, spreads and numbers as what JSON knows; pictures are left out, numbers that are not finite become None."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if not isinstance(getattr(value, f.name), np.ndarray)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


__all__ = ["Arm", "ArmResult", "CompareSettings", "Comparison", "EqualTime", "Judge", "compare", "load_judge"]
