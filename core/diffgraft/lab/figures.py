"""From raw rounds and pictures to the figures of a comparison: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from diffgraft.installed.errors import ConfigError
from diffgraft.lab.metrics import Spread, psnr, ssim
from diffgraft.lab.results import EqualTime, Fidelity, Latency, Macs, Timing
from diffgraft.methods.inputs import Pictures


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
    paired = Spread.of([b.seconds / t.seconds for b, t in zip(baseline, timings, strict=True)])
    return Latency(
        seconds=seconds,
        denoise=denoise,
        of_medians=base.p50 / seconds.p50,
        denoise_of_medians=base_denoise.p50 / denoise.p50 if denoise and base_denoise else None,
        paired=paired,
        within_noise=paired.low <= 1 <= paired.high,
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
