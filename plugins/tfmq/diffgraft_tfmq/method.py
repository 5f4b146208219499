"""TFMQ-DM's own arithmetic (arXiv 2311.16503). Free of diffusers.

The temporal information block g = (g_1 .. g_n) gives each block i of a U-Net its temporal feature g_i(t), of the timestep alone. The
rounding of all of its weights is learned together (TIAR),

    minimise  sum_i E_t |g_i(t) - g_i^(t)|^2  +  lambda sum (1 - |2 h - 1|^beta)

over the timesteps of the schedule, of which there are finitely many: no picture is needed. For the same reason its inputs have finitely
many ranges, so each timestep has a scale of its own (FSC). Where a U-Net adds the embedding of a class or of a pooled text to the
timestep's, g depends on that vector too, and those of the calibration are taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from diffgraft.methods.quant.affine import Scale, UniformAffine
from torch import Tensor

KEPT = re.compile(r"^conv_in$|^conv_out$|(^|\.)conv_shortcut$|(^|\.)downsamplers\.\d+\.conv$|^(add|class)_embedding\.")
"""What stays in floats as in the official code: the first and the last layer, shortcuts, and convolutions that only make smaller; and
embeddings of texts and classes that are added to the timestep's, which no official model has."""
TEMPORAL = re.compile(r"^time_embedding\.(linear_1|linear_2)$|(^|\.)time_emb_proj$")
"""The temporal information block, as diffusers calls its layers."""


def is_kept(path: str) -> bool:
    return KEPT.search(path) is not None


def is_temporal(path: str) -> bool:
    return TEMPORAL.search(path) is not None


def features(outputs: Sequence[Tensor]) -> Tensor:
    """(g_1 .. g_n) side by side [timesteps, channels]: their squared distance, summed over channels and meant over timesteps, is the
    sum over i."""
    return torch.cat(list(outputs), 1)


def finite_set(low: Tensor, high: Tensor, grid: UniformAffine, one: bool = False) -> Scale:
    """Scales of inputs [timesteps, 1] from the ends of their ranges [timesteps]; ``one``: each that of all timesteps together.

    The grid of a timestep spans its own range alone, so no step of it is longer than that of the range of all.
    """
    if one:
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    return Scale(*(each[:, None].clone() for each in grid.scale(low.float(), high.float())))


def nearest_time(t: Tensor, times: Tensor) -> Tensor:
    """Number of the calibrated timestep that is nearest to t, 0-dim; of several values (one a row) each one's [rows]. Nothing waits for
    the device."""
    nearest = (times.to(t.device) - t.float().reshape(-1, 1)).abs().argmin(1)
    return nearest if len(nearest) > 1 else nearest[0]


def similarity(x: Tensor, y: Tensor) -> Tensor:
    """Mean over the timesteps of the cosine between features [timesteps, channels]."""
    return torch.cosine_similarity(x.float(), y.float(), dim=1).mean()
