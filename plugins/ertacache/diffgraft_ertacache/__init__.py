"""ERTACache: reuse what a DiT's blocks add to their input, at steps found offline, and correct what that gets wrong (arXiv 2508.21091).

A computed step keeps the residual r = (output of the last block) - (input of the first). A step of the static set S reuses it: no block
runs, the stack's output is its input + r~. Two things make up for the difference: the velocity that comes out is rectified by a linear
model of its error, and under the flow-matching Euler scheduler steps of S are shortened by phi, the rest of the way being shared out anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import (
    ArtefactMismatch,
    BlockCall,
    ConfigError,
    DenoiseCall,
    Effects,
    Family,
    Need,
    Plugin,
    Schedule,
    ScheduleCall,
    Target,
    Unsupported,
)
from diffgraft.methods.artefacts import Artefact, make_again
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from diffgraft_ertacache.calibration import HOLDS, LEADING, Measure, channel_axis
from diffgraft_ertacache.knobs import PAPER, ERTACacheConfig
from diffgraft_ertacache.method import adjusted_sigmas, may_reuse, policy, rectification
from diffgraft_ertacache.stream import Stream, last_block

__all__ = ["ERTACache"]
__version__ = "0.1.0"


@dataclass
class Cache:
    """Of a branch: its stream and which step was computed last. Of the run (``call.shared``): what the artefact says."""

    stream: Stream = field(default_factory=Stream)
    index: int = -1
    last: int = -1
    seen: Any = None
    errors: list[list[float]] = field(default_factory=list)
    linear: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    tails: dict[str, str] = field(default_factory=dict)


class ERTACache(Plugin):
    name = "ertacache"
    paper = PAPER
    families = ("dits",)
    Config = ERTACacheConfig
    State = Cache
    neutral: ClassVar[dict[str, Any]] = {"threshold": 0}
    active: ClassVar[dict[str, Any]] = {"threshold": 10.0}
    sessions = True
    effects = Effects(skips=frozenset({"blocks"}), edits=frozenset({"schedule", "prediction"}), needs=frozenset({"calibrated_run"}))
    needs = (Need("artefact", "artefact", holds=HOLDS),)
    calibration = Measure
    tune: ClassVar[dict[str, Any]] = {"threshold": (0.05, 0.1, 0.2, 0.4), "phi": ("off", "velocity")}
    config: ERTACacheConfig

    @classmethod
    def claims(cls, family: Family) -> bool:
        """Not where rows end differently: what the blocks did to a row's own tokens is not known there."""
        return super().claims(family) and all(group.joined != "mixed" for group in family.blocks)

    def check(self, target: Target) -> None:
        artefact, asked = target.given.get("artefact"), self.own_knobs.get("max_reuse", 0)
        if artefact is not None and asked > (W := artefact.tensors["error"].shape[1]):
            raise ConfigError(
                f"plugin 'ertacache': max_reuse = {asked}: the calibration measured residuals up to {W} steps old, and a run can only "
                f"lower that; give at most {W}, or calibrate with -o ertacache.max_reuse={asked}"
            )
        for block in target.blocks:
            if block.joined == "mixed":
                raise Unsupported(
                    f"ertacache: {block.path} of {type(target.pipe).__name__} holds as many tokens of text in each row as that has, so the "
                    "sample's are elsewhere in each, and a residual of one step cannot be laid over another's"
                )
            if not block.is_layer and not ({block.stream} <= set(block.returns) <= set(block.takes)):
                raise Unsupported(
                    f"ertacache: {block.path} takes {', '.join(block.takes)} and returns {', '.join(block.returns)}: blocks can be left "
                    f"out only where one stream ({block.stream!r}) runs through all of them and each returns nothing that it does not take"
                )

    def select_blocks(self, blocks: Any) -> Any:
        return [] if self.config.threshold == 0 else super().select_blocks(blocks)

    def errors(self, call: Any) -> list[list[float]]:
        """The calibrated errors [T][W], read once a run."""
        shared: Cache = call.shared
        if not shared.errors:
            shared.errors = calibrated(call).tensors["error"].tolist()  # check: allow host_sync because the artefact is on the CPU
        return shared.errors

    # timestep adjustment ------------------------------------------------------------------------------------------------------------

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        knobs = self.config
        artefact = calibrated(call) if knobs.threshold > 0 else None  # a missing one is refused before anything is computed
        base: Schedule = next(call)
        if artefact is None or knobs.phi == "off":
            return base
        if why := unadjustable(call.scheduler, base):
            call.note(f"step sizes are not adjusted (phi = 1): {why}")
            return base
        ages = policy(self.errors(call), knobs.threshold, knobs.max_reuse, knobs.first, knobs.last)
        phi = [1.0 if k == 0 else float(artefact.tensors[f"phi.{knobs.phi}"][i, k - 1]) for i, k in enumerate(ages)]
        ahead = len(base.timesteps) - len(phi)  # image to image runs only the tail
        if ahead < 0 or set(phi) == {1.0}:
            return base  # another number of steps is refused when the denoiser is first called
        phi = torch.tensor([1.0] * ahead + phi[:-1] + [1.0], dtype=torch.float64)
        sigmas = adjusted_sigmas(base.sigmas, phi)
        return Schedule((sigmas[:-1] * call.scheduler.config.num_train_timesteps).to(base.timesteps.dtype), sigmas)

    # residual reuse and rectification -----------------------------------------------------------------------------------------------

    def block(self, call: BlockCall, next: Any) -> Any:
        return call.state.stream.through(call, next)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        knobs = self.config
        if knobs.threshold == 0:
            return next(call)  # type: ignore[no-any-return]
        errors, state = self.errors(call), call.state
        stream, step, i = state.stream, call.step, call.step.call
        if i == state.index or call.extra:  # asked again (by a plugin further out), or for something else: that was not calibrated
            stream.begin(None)
            return next(call)  # type: ignore[no-any-return]
        if i < state.index:  # the schedule began again
            state.seen = None
        state.index, k = i, i - state.last
        x = call.sample
        seen = (call.model_name, x.shape, x.dtype, x.device)
        free = knobs.first <= step.index < step.total - knobs.last  # not one of the steps that are always computed
        reuse = state.seen == seen and free and may_reuse(errors, i, k, knobs.threshold, knobs.max_reuse, 0, 0)
        call.count("skipped" if reuse else "computed")
        if not reuse:
            state.seen, stream.residual = None, None  # a forward that fails half-way leaves nothing to reuse
        tails = call.shared.tails
        if call.model_name not in tails:
            tails[call.model_name] = last_block(call)
        stream.begin(tails[call.model_name], stream.residual)
        v: Tensor = next(call)
        stream.begin(None)
        if not reuse:
            state.last, state.seen = i, seen if stream.residual is not None else None
        elif knobs.rectify:
            gain, offset = self.linear(call, v)
            v = rectified(v, gain[i, k - 1], offset[i, k - 1])
        return v

    def linear(self, call: DenoiseCall, v: Tensor) -> tuple[Tensor, Tensor]:
        """gain and offset [T, W, branches, 1, ..., C, ...] for predictions like ``v``, moved to its device once a run."""
        key = (call.branches, v.ndim, v.device)
        found: tuple[Tensor, Tensor] | None = call.shared.linear.get(key)
        if found is None:
            tensors = calibrated(call).tensors
            K, B = (torch.stack([of_branch(tensors, name, b) for b in call.branches], dim=2) for name in "KB")
            shape, axis = [1] * v.ndim, channel_axis(call.family, v.ndim)
            if K.shape[-1] != v.shape[axis]:
                raise ArtefactMismatch(
                    f"ertacache: the artefact's K and B are for {K.shape[-1]} channels, this denoiser gives {v.shape[axis]}; "
                    f"{make_again('ertacache')}"
                )
            shape[axis] = K.shape[-1]
            found = tuple(x.to(v.device).reshape(*K.shape[:3], *shape) for x in rectification(K, B))  # type: ignore[assignment]
            call.shared.linear[key] = found
        return found  # type: ignore[return-value]


def rectified(v: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """v^ = gain v~ + offset, for each branch its own; v is [branches * batch, ...], gain and offset [branches, 1, ..., C, ...]."""
    parts = v.unflatten(0, (gain.shape[0], -1))
    return torch.addcmul(offset, parts.float(), gain).to(v.dtype).flatten(0, 1)


def calibrated(call: Any) -> Artefact:
    """The artefact.

    Raises:
        ConfigError: there is none.
    """
    artefact: Artefact | None = call.given("artefact")
    if artefact is None:
        raise ConfigError(f"plugin 'ertacache': artefact = None: which steps may be reused is measured; {make_again('ertacache')}")
    return artefact


def of_branch(tensors: Mapping[str, Tensor], name: str, branch: str) -> Tensor:
    """K or B of a branch; a branch that was not calibrated (guidance was off there) gets those of the conditional one."""
    return tensors.get(f"{name}.{branch}", tensors[f"{name}.{LEADING}"])


def unadjustable(scheduler: Any, base: Schedule) -> str | None:
    """Why this schedule's steps cannot be made shorter, or None where they can."""
    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return f"{name} is not FlowMatchEulerDiscreteScheduler; solvers with a memory or several stages rely on their own grid"
    for key in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(key):
            return f"{name} with {key}"
    assert base.sigmas is not None
    steps = scheduler.config.num_train_timesteps
    even = torch.allclose(base.timesteps.float(), base.sigmas[:-1].float() * steps, rtol=1e-4, atol=1e-3)
    if not even or base.sigmas[-1] != 0 or not bool((base.sigmas[:-1] > base.sigmas[1:]).all()):
        return "its timesteps are not those of falling sigmas that end in 0"
    return None
