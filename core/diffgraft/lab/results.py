"""What a comparison found, as data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffgraft.installed.errors import ConfigError
from diffgraft.lab.metrics import Mean, Share, Spread
from diffgraft.methods.inputs import CallSettings, Pictures, Sample
from diffgraft.stacks.report import Report

Kind = Literal["baseline", "plugin", "stack", "fewer_steps"]

SCHEMA = 1
"""Number of the layout of ``compare.json``."""


METHOD = {
    "latency": "whole pipe(...) call, one sample, wall clock with the device synchronised; warm-up calls first; rounds run every arm once, "
    "every other round in reverse order, all arms of a round with the same prompt and seed",
    "denoise": "the part of a call between the first denoiser call's start and the last one's end (schedulers' steps in between included)",
    "speedup.of_medians": "median seconds of the baseline / median seconds of the arm",
    "speedup.paired": "per round: seconds of the baseline / seconds of the arm; within_noise: their range holds 1, so no gain is claimed",
    "inactive": "plugins of the arm that said in every round (in some, where no picture changed) that they did nothing; an arm of "
    "such alone has no gain to read",
    "macs": "multiply-adds of one run inside the denoiser(s): FLOPs by torch's formulas / 2 (matrix products, convolutions, attention; "
    "element-wise work and custom kernels are not seen)",
    "macs.limit": "MACs of the baseline / MACs of the arm: the speed-up of the denoiser if time went with MACs; limit_whole_call adds the "
    "baseline's measured time outside the denoise part",
    "fidelity": "PSNR (dB) and SSIM (Gaussian window 11) of each float picture to the reference's (the baseline with `reference_steps` "
    "steps where that is given, else the baseline itself), data range 1; equal ones count in `identical`, PSNR's mean is over the others",
    "advantage": "mean over the pictures of the stack's PSNR minus that of fewer steps at equal time, with its 95 % bootstrap interval "
    "(of fewer than 5 pictures: their least and most)",
    "fewer_steps": "the baseline with the step count whose time is nearest to the stack's: "
    "linear fit through pilot runs at all and at half the steps",
    "judge": "shares of right verdicts with 95 % Wilson intervals; `all` = everything that the prompt asks for is right",
}


@dataclass(frozen=True)
class CompareSettings:
    """What to run.

    samples   the pictures of the fidelity figures; latency rounds take them in turn
    steps     denoising steps of every arm but "fewer steps"
    plugin_steps  steps of the arms with plugins, for methods that make do with fewer; None: ``steps``
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
    plugin_steps: int | None = None

    def __post_init__(self) -> None:
        limits = {"steps": 1, "repeats": 1, "warmup": 0, "pilot": 1, "batch": 1}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} = {getattr(self, name)}: must be >= {least}")
        if self.plugin_steps is not None and self.plugin_steps < 1:
            raise ConfigError(f"plugin_steps = {self.plugin_steps}: must be >= 1")
        if self.reference_steps is not None and self.reference_steps <= self.steps:
            raise ConfigError(f"reference_steps = {self.reference_steps}: must be more than the {self.steps} steps that are compared")
        if not self.samples:
            raise ConfigError("nothing to compare: give at least one prompt or seed")


@dataclass(frozen=True)
class Arm:
    """One side of the comparison. ``plugins``: knobs in force by name, outermost first; ``compared``: those of them that the baseline has
    not; ``neutral``: these are set to change nothing."""

    name: str
    kind: Kind
    steps: int
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    compared: tuple[str, ...] = ()
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
    """Seconds of the whole call and of its denoise part, and the ratios to the baseline.

    ``within_noise``: some rounds say faster and some slower, so the ratio is no gain and no loss.
    """

    seconds: Spread
    denoise: Spread | None
    of_medians: float
    denoise_of_medians: float | None
    paired: Spread
    within_noise: bool
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
    inactive: tuple[str, ...]
    """Those of the compared plugins that said in every round that they did nothing; in some, where no picture changed."""
    pictures: Pictures

    @property
    def is_idle(self) -> bool:
        """Whether nothing that the arm adds to the baseline did anything."""
        return self.arm.kind in ("plugin", "stack") and len(self.inactive) == len(self.arm.compared)

    @property
    def reading(self) -> str:
        """The speed in words: ``2.61x faster``; no gain where there is none to read."""
        ratio = self.latency.of_medians
        if self.arm.kind == "baseline":
            return "the baseline"
        if self.is_idle:
            return "inactive, did nothing"
        if self.latency.within_noise:
            return f"as fast, within noise ({ratio:.2f}x)"
        return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x slower"


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

    @property
    def held(self) -> bool:
        """Whether the rounds took about the time that the steps were chosen for; on a machine that others use they may not."""
        return self.capped or 0.8 <= self.realised <= 1.25

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
        """The product of the parts of a stack; None for a single plugin, and where every part has the gain of fewer steps in it."""
        parts = [result for result in self.arms if result.arm.kind == "plugin"]
        whole = next((result for result in self.arms if result.arm.kind == "stack"), None)
        if whole is None or self.settings.plugin_steps is not None:
            return None
        gains = (1.0 if part.is_idle else part.latency.of_medians for part in parts)  # noise is no factor
        speedups = (math.prod(gains), whole.latency.of_medians)
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
        arms = [{**plain(item), "reading": item.reading} for item in self.arms]
        derived = {"product": plain(self.product), "advantage": plain(self.advantage), "unfinished": None}
        return {"schema": SCHEMA, "method": METHOD, **plain(self), "arms": arms, **derived}


@dataclass
class Unfinished:
    """What was measured of a comparison that an exception or an interrupt ended.

    ``during`` phase and arm; ``error`` what ended it; ``whole_rounds`` rounds that every arm has; ``arms`` what there is of each.
    """

    pipeline: str
    settings: CompareSettings
    always: tuple[str, ...]
    during: str
    error: str
    whole_rounds: int
    arms: list[PartialArm]
    equal_time: EqualTime | None
    environment: dict[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As of a comparison; ``unfinished`` says what is missing."""
        raw = plain(self)
        unfinished = {key: raw.pop(key) for key in ("during", "error", "whole_rounds")}
        return {"schema": SCHEMA, "method": METHOD, "unfinished": unfinished, **raw}


@dataclass(frozen=True)
class PartialArm:
    """One arm of an unfinished comparison: all timings, their figures over the whole rounds, and its nearness if its pictures were made."""

    arm: Arm
    timings: list[Timing]
    latency: Latency | None
    macs_per_run: int | None
    fidelity: Fidelity | None


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
    if isinstance(value, Image.Image):
        return f"a picture, {value.width}x{value.height}"
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
