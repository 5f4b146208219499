"""Timestep segments and preference optimisation within one of them (AlignHuman, arXiv 2506.11144), without models.

The noise of a sample x = a x_0 + s eps is measured by sigma = s / (a + s), which falls from 1 (noise alone) to 0 (clean) along a run. It
depends on the ratio s / a alone, so it is the same for the variance-preserving and the exploding form of a sample; of flow models, where
a = 1 - sigma and s = sigma, it is the sigma of their scheduler.

S_k = [to, from) is the segment of expert k, in sigma; a segment from 1 takes sigma = 1 in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Segment = tuple[float, float]
"""(from, to): where an expert begins to act and where it ends, as a run passes them."""
NEAR = 1e-6
"""Rounding of levels in float32: 0.6 of a schedule is the 0.6 that was asked for."""


def normalised(a: Tensor, s: Tensor) -> Tensor:
    """sigma = s / (a + s)."""
    return s / (a + s)


def is_in(sigma: float, segment: Segment) -> bool:
    """Whether sigma is in S_k = [to, from). What lies on a boundary belongs to the noisier side, as Wan 2.2 has it."""
    start, end = segment
    return end - NEAR <= sigma and (sigma < start - NEAR or start >= 1)


def active(sigma: float, segments: Sequence[Segment]) -> tuple[int, ...]:
    """Numbers of the segments that sigma is in; none in a gap."""
    return tuple(k for k, segment in enumerate(segments) if is_in(sigma, segment))


def overlapping(segments: Sequence[Segment]) -> tuple[int, int] | None:
    """Numbers of the first two segments that share more than a boundary."""
    for k, (start, end) in enumerate(segments):
        for j, (other_start, other_end) in enumerate(segments[:k]):
            if min(start, other_start) > max(end, other_end):
                return j, k
    return None


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """|target - prediction|^2 over the number of a sample's elements, [batch], in float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def preference_logit(worse: Tensor, worse_ref: Tensor, better: Tensor, better_ref: Tensor, beta: float) -> Tensor:
    """The logit of preferring x_w to x_l, from squared errors [batch] of expert (theta) and base model (ref) on both:

    -beta ((|e - e_theta(x_w)|^2 - |e - e_ref(x_w)|^2) - (|e - e_theta(x_l)|^2 - |e - e_ref(x_l)|^2))

    It is 0 where the expert is the base model, and grows as the expert gets better on x_w than it gets on x_l.
    """
    return -beta * ((better - better_ref) - (worse - worse_ref))


def preference_loss(logit: Tensor) -> Tensor:
    """-log sigmoid(logit): log 2 for an expert that is the base model (Diffusion-DPO, arXiv 2311.12908, eq. 14, within S_k)."""
    return -torch.nn.functional.logsigmoid(logit)


START = math.log(2)
"""The loss before anything is learned."""
