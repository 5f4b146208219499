"""What ERTACache measures offline: how far each step's residual is from those before it, and what reusing them does to the velocity.

One uncached run a prompt. After each denoiser call the same call is made again with the blocks left out and an older residual in their
place, for each of the last W residuals: that gives v~ exactly, at the price of the embedding and the output layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffgraft import BlockCall, Calibrator, DenoiseCall, Family, RunCall
from diffgraft.methods.schema import Holds, Values
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_ertacache.knobs import PAPER, ERTACacheConfig
from diffgraft_ertacache.method import correction_coefficient, linear_model, moments, relative_error
from diffgraft_ertacache.stream import Stream, last_block

LEADING = "cond"
"""The branch that decides on policy and step sizes: every run has it, with guidance and without."""


@dataclass
class Measured:
    """Of a branch: its stream and its last W (step, model, residual); of the run: what was measured."""

    stream: Stream = field(default_factory=Stream)
    history: list[tuple[int, str, Tensor]] = field(default_factory=list)
    velocity: Tensor | None = None
    records: dict[str, Tensor] = field(default_factory=dict)


class Facts(TypedDict):
    """Of an artefact: the branches that were calibrated, none where a run had one step."""

    branches: list[str]


MOST = 1e6
"""Largest |K| and |B| that is taken for a measurement."""


def incomplete(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What an artefact of several steps lacks, or None."""
    if len(tensors["error"]) == 1:
        return None
    needed = ["phi.velocity", "phi.difference", *(f"{name}.{branch}" for name in "KB" for branch in {LEADING, *facts["branches"]})]
    return next((f"the tensor {name!r} is missing" for name in needed if name not in tensors), None)


HOLDS = Holds(
    tensors={
        "error": Values(("T", "W"), low=0, infinite=True),
        "phi.velocity": Values(("T", "W"), low=0, high=1, optional=True),
        "phi.difference": Values(("T", "W"), low=0, high=1, optional=True),
        "K.*": Values(("T", "W", "C"), low=-MOST, high=MOST),
        "B.*": Values(("T", "W", "C"), low=-MOST, high=MOST),
    },
    facts=Facts,
    also=incomplete,
)


class Measure(Calibrator):
    """Records of one run, T steps and ages 1..W: "error" [T, W]; "norms" [3, T, W], the l1 norms of v~ - v, v and v - v_{i-1}; and
    "moments.<branch>" [5, T, W, C]."""

    name = "ertacache_calibration"
    paper = PAPER
    Config = ERTACacheConfig
    State = Measured
    config: ERTACacheConfig

    def block(self, call: BlockCall, next: Any) -> Any:
        return call.state.stream.through(call, next)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        state: Measured = call.state
        i, W, model = call.step.call, self.config.max_reuse, call.model_name
        if call.extra or (state.history and state.history[-1][0] == i):  # skip-layer guidance; asked again for one step
            state.stream.begin(None)
            return next(call)  # type: ignore[no-any-return]
        tail = last_block(call)
        state.stream.residual = None
        state.stream.begin(tail)
        v: Tensor = next(call)
        r = state.stream.residual
        if r is None:
            state.stream.begin(None)
            return v
        before = state.velocity if state.velocity is not None and state.velocity.shape == v.shape else v
        for j, other, cached in state.history:
            if i - j <= W and other == model and cached.shape == r.shape:
                state.stream.begin(tail, cached)
                self.measure(call, i - j, (cached, r), (next(call), v, before))
        state.stream.begin(None)
        state.velocity = v
        state.history = [*state.history, (i, model, r)][-W:]
        return v

    def measure(self, call: DenoiseCall, k: int, residuals: tuple[Tensor, Tensor], velocities: tuple[Tensor, Tensor, Tensor]) -> None:
        """Note what reusing a residual of age ``k`` does here; rows of several branches are told apart."""
        i, n = call.step.call, len(call.branches)
        T, W = call.step.calls, self.config.max_reuse
        records = call.shared.records
        axis = channel_axis(call.family, velocities[0].ndim)
        for branch, cached, true, guess, v, before in zip(call.branches, *(x.chunk(n) for x in (*residuals, *velocities)), strict=True):
            if branch == LEADING:
                error = records.setdefault("error", torch.full((T, W), torch.inf))
                norms = records.setdefault("norms", torch.zeros(3, T, W))
                error[i, k - 1] = relative_error(cached, true)
                parts = (guess - v, v, v - before)
                norms[:, i, k - 1] = torch.stack([part.float().abs().sum() for part in parts])
            sums = moments(guess.movedim(axis, -1), (guess.float() - v.float()).movedim(axis, -1))
            records.setdefault(f"moments.{branch}", torch.zeros(5, T, W, sums.shape[-1]))[:, i, k - 1] = sums

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        return dict(call.shared.records)

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Means over the prompts: "error" [T, W], "phi.difference" and "phi.velocity" [T, W], and "K.<branch>", "B.<branch>" [T, W, C]."""
        whole = [record for record in records if "error" in record]
        if not whole:  # a single step: nothing could be reused
            return {"error": torch.full((1, 1), torch.inf)}, {"branches": []}
        error, size, change = torch.stack([record["norms"] for record in whole]).sum(0)
        tensors = {
            "error": torch.stack([record["error"] for record in whole]).mean(0),
            "phi.difference": correction_coefficient(error, change),
            "phi.velocity": correction_coefficient(error, size),
        }
        branches = sorted(name.partition(".")[2] for name in whole[0] if name.startswith("moments."))
        for branch in branches:
            sums = torch.stack([record[f"moments.{branch}"].double() for record in whole]).sum(0)
            tensors[f"K.{branch}"], tensors[f"B.{branch}"] = linear_model(sums)
        return tensors, {"branches": branches}


def channel_axis(family: Family, ndim: int) -> int:
    """The axis of the channels in a denoiser's output: tokens [rows, tokens, C] or the family's layout of latents."""
    return -1 if ndim == 3 else family.channel_axis
