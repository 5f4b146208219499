"""How near two sets of pictures are, and how sure a share is: pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffgraft.methods.extras import imported
from diffgraft.methods.inputs import Pictures

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window in pixels; a smaller picture has no SSIM."""


def psnr(pictures: Pictures, reference: Pictures) -> list[float]:
    """Peak signal-to-noise ratio of each picture in dB, data range 1: 10 log10(1 / MSE); infinite where the two are equal."""
    difference = pictures.astype(np.float64) - reference.astype(np.float64)
    errors = np.square(difference).reshape(len(pictures), -1).mean(axis=1)
    return [math.inf if error == 0 else -10 * math.log10(error) for error in errors]


def ssim(pictures: Pictures, reference: Pictures) -> list[float] | None:
    """Structural similarity of each picture (Gaussian window of 11, data range 1; mean over the frames of a video).

    None for pictures smaller than the window.
    """
    n, frames, height, width, channels = pictures.shape
    if min(height, width) < SSIM_WINDOW:
        return None

    def stack(x: Pictures) -> torch.Tensor:
        return torch.from_numpy(x).reshape(n * frames, height, width, channels).permute(0, 3, 1, 2)

    torchmetrics = imported("torchmetrics.functional.image", "SSIM")  # slow to import: it brings matplotlib
    values = torchmetrics.structural_similarity_index_measure(stack(pictures), stack(reference), data_range=1.0, reduction="none")
    return [float(v) for v in torch.as_tensor(values).reshape(n, frames).mean(dim=1)]


@dataclass(frozen=True)
class Share:
    """``right`` of ``total``, with the 95 % Wilson interval of the share."""

    right: int
    total: int
    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.right}/{self.total} ({100 * self.low:.0f}-{100 * self.high:.0f} %)"


def share(verdicts: Sequence[bool | None]) -> Share | None:
    """The share of True; None verdicts do not count. None when nothing counts."""
    counted = [verdict for verdict in verdicts if verdict is not None]
    if not counted:
        return None
    right, total = sum(counted), len(counted)
    low, high = wilson(right, total)
    return Share(right, total, right / total, low, high)


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share (95 % for the default ``z``)."""
    p = right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


FEW = 5
"""Fewer values than these say nothing of how far their mean may be off: then the least and the most of them stand for the interval."""


@dataclass(frozen=True)
class Mean:
    """Mean of independent values with its 95 % interval (percentile bootstrap), or with their least and most where they are few."""

    mean: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float], draws: int = 10_000) -> Mean:
        found = np.asarray(values, dtype=np.float64)
        if len(found) < FEW:
            return cls(float(found.mean()), float(found.min()), float(found.max()), len(found))
        chosen = np.random.default_rng(0).integers(len(found), size=(draws, len(found)))
        low, high = np.quantile(found[chosen].mean(axis=1), [0.025, 0.975])
        return cls(float(found.mean()), float(low), float(high), len(found))

    def text(self, unit: str) -> str:
        """``+1.20 dB (+0.90 to +1.60, 95 % interval)``; of few values what they are, and of one only that."""
        mean = f"{self.mean:+.2f} {unit}"
        if self.count == 1:
            return f"{mean} (of one picture)"
        what = "95 % interval" if self.count >= FEW else f"least and most of {self.count} pictures"
        return f"{mean} ({self.low:+.2f} to {self.high:+.2f}, {what})"


@dataclass(frozen=True)
class Spread:
    """Median (p50), quartiles and extremes of repeated measurements."""

    p50: float
    q25: float
    q75: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q25, q75 = np.quantile(values, [0.25, 0.75])
        return cls(statistics.median(values), float(q25), float(q75), min(values), max(values))
