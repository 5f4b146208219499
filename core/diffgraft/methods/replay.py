"""The first steps of a run once more, without the denoiser: recorded for all samples of a batch, answered for some of them.

A plugin that tries many seeds for a few steps and goes on with the best of them wraps ``run``: one pass makes the beginnings (``schedule``
gives only the first steps), the next one is asked for the chosen samples alone and takes their beginning from the record. The scheduler
goes through its steps again, from the same predictions, so its history (multistep solvers) and its noise (the sample's own generator) are
what they were: bit for bit up to there. (What the first pass itself ends in may be another: multistep solvers make the last step of any
schedule at a lower order.)

    def denoise(self, call, next):
        record = call.shared.record
        if (known := record.answer(call, rows)) is not None:
            return known
        return record.keep(call, next(call))

Such a plugin declares ``skips={"denoiser"}``: what keeps features of a whole batch (a cache) would answer for samples that are gone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffgraft.kernel.calls import DenoiseCall


class Record:
    """Raw predictions of the first ``calls`` scheduler calls of a run, all branches; keep it in the plugin's shared state."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self._kept: dict[tuple[int, str, str], tuple[Tensor, ...]] = {}

    def keep(self, call: DenoiseCall, prediction: Tensor) -> Tensor:
        """Note the prediction where it belongs to the beginning; gives it back."""
        if call.step.call < self.calls:
            self._kept[self._key(call)] = prediction.chunk(len(call.branches))
        return prediction

    def answer(self, call: DenoiseCall, rows: Sequence[int]) -> Tensor | None:
        """The prediction of the recorded samples number ``rows``, branch by branch as ``call`` has them; None where there is none."""
        found = self._kept.get(self._key(call))
        if found is None:
            return None
        return torch.cat([part[list(rows)] for part in found])

    @staticmethod
    def _key(call: DenoiseCall) -> tuple[int, str, str]:
        return call.step.call, call.model_name, call.branch or ""
