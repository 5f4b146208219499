"""The first steps of a run once more, without the denoiser: recorded for all samples of a batch, answered for some of them.

A plugin that tries many seeds for a few steps and goes on with the best of them wraps ``run``: one pass makes the beginnings (``schedule``
gives only the first steps), or several do where the seeds do not fit into one; the last one is asked for the chosen samples alone and takes
their beginning from the record. The scheduler goes through its steps again, from the same predictions, so its history (multistep solvers)
and its noise (the sample's own generator) are what they were: bit for bit up to there. (What a shortened pass itself ends in may be
another: multistep solvers make the last steps of a schedule at a lower order, see :func:`beginning`.) All this holds for a run that begins
where the recorded sample began: :meth:`Record.ensure_begun_alike`, after the run, says whether it did.

    def denoise(self, call, next):
        record = call.shared.record
        if (known := record.answer(call, rows)) is not None:
            return known
        return record.keep(call, next(call))

Such a plugin declares ``skips={"denoiser"}``: what keeps features of a whole batch (a cache) would answer for samples that are gone; and
``needs={"extra_forwards"}``, as it saves nothing against a plain run of one seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffgraft.installed.errors import Conflict
from diffgraft.kernel.calls import DenoiseCall, Schedule, ScheduleCall
from diffgraft.kernel.facts import pace_of as pace_of

Key = tuple[int, str, str]
Parts = tuple[Tensor, ...]
APART = 1e-3
"""Of the largest value: rows of a batch of another size differ by rounding, other noise by about 1."""


class Record:
    """Raw predictions of the first ``calls`` scheduler calls of a run, all branches; keep it in the plugin's shared state.

    Samples are numbered through all recorded passes, in the order of :meth:`another_pass`.
    """

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self._passes: list[dict[Key, Parts]] = [{}]
        self._begun: list[Parts] = []
        """The samples that the denoiser is asked at first, of each pass."""
        self._apart: Tensor | None = None
        """How far from these the answered run began, of their largest value; not read before that is over."""

    def another_pass(self) -> None:
        """The pipeline is about to run again for further samples: they come behind those that are recorded."""
        if self._passes[-1]:
            self._passes.append({})

    def keep(self, call: DenoiseCall, prediction: Tensor) -> Tensor:
        """Note the prediction where it belongs to the beginning; gives it back."""
        if call.step.call < self.calls:
            self._passes[-1][self._key(call)] = prediction.chunk(len(call.branches))
        if call.step.call == 0:
            self._begun[len(self._passes) - 1 :] = [(call.latents,)]
        return prediction

    def choose(self, rows: Sequence[int]) -> None:
        """Forget all samples but number ``rows``, which are 0, 1, ... from now on; the memory of the others is free."""
        kept: dict[Key, Parts] = {}
        for key in list(self._passes[0]):
            kept[key] = picked([found.pop(key) for found in self._passes], rows)
        self._passes = [kept]
        self._begun = [picked(self._begun, rows)] if self._begun else []

    def answer(self, call: DenoiseCall, rows: Sequence[int]) -> Tensor | None:
        """The prediction of the recorded samples number ``rows``, branch by branch as ``call`` has them; None where there is none."""
        key = self._key(call)
        if any(key not in found for found in self._passes):
            return None
        if call.step.call == 0:
            [begun] = picked(self._begun, rows)
            self._apart = (call.latents - begun).abs().max() / begun.abs().max()
        return torch.cat(picked([found[key] for found in self._passes], rows))

    def ensure_begun_alike(self, name: str) -> None:
        """To be asked by plugin ``name`` once the answered run is over, as the host waits for the device here.

        Raises:
            Conflict: it began at other samples than the recorded ones, so the answers were not its own.
        """
        if self._apart is not None and float(self._apart) > APART:
            raise Conflict(
                f"{name}: the run that takes its first steps from a record began at other noise than the recorded one, so something "
                f"further in decides the noise (another plugin, a wrapped pipeline); keep one of the two"
            )

    @staticmethod
    def _key(call: DenoiseCall) -> Key:
        return call.step.call, call.model_name, call.branch or ""


def picked(passes: Sequence[Parts], rows: Sequence[int]) -> Parts:
    """Samples number ``rows`` of each branch, as tensors of their own."""
    samples = [[row for part in branch for row in part.split(1)] for branch in zip(*passes, strict=True)]
    return tuple(torch.cat([branch[row] for row in rows]) for branch in samples)


def beginning(call: ScheduleCall, schedule: Schedule, calls: int) -> Schedule:
    """The schedule of a pass that is to be recorded: the first ``calls`` calls, and those beyond that they need to be what they are in the
    whole one.

    Solvers of order p take the last p - 1 steps of any schedule at a lower order. The last recorded call is asked before its step, so
    that of p = 2 this does no harm; of a higher order p - 2 further steps are there, whose predictions lead nowhere: answer them with any.
    """
    orders = [int(call.scheduler.config.get(name) or 1) for name in ("solver_order", "predictor_order", "corrector_order")]
    end = calls + max(0, max(orders) - 2)
    return Schedule(schedule.timesteps[:end], None if schedule.sigmas is None else schedule.sigmas[: end + 1])
