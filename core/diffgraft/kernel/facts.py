"""What plugins are told as plain facts: where a run is, which block, which attention layer, what a ``check`` may look at."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from diffgraft.kernel.family import Family


@dataclass(frozen=True)
class Step:
    """Where a run is.

    index   count of ``scheduler.step`` calls since ``set_timesteps``: never looked up from a timestep's value
    total   how many there will be (image-to-image runs only the tail of the schedule; Heun counts each of its two stages)
    t       the scheduler's timestep, a 0-dim tensor (reading its value would wait for the GPU)
    sigma   the scheduler's sigma at this step, a 0-dim tensor, or None where the scheduler has none
    begin   steps of the schedule before the first that is run: this one is number ``begin + index`` of the schedule
    """

    index: int
    total: int
    t: Tensor
    sigma: Tensor | None
    begin: int = 0

    @property
    def is_last(self) -> bool:
        return self.index == self.total - 1


@dataclass(frozen=True, eq=False)
class BlockInfo:
    """A hookable block.

    ``path`` on the denoiser ("up_blocks.2.resnets.1"), ``kind`` ("up", "up.resnet", "double"...), ``index`` of the (top-level) block within
    its group, ``layer`` index inside the block or -1, ``order`` running number over the denoisers, ``takes`` and ``returns`` as the family
    says, ``model`` the denoiser's attribute name, and the ``module``.
    """

    path: str
    kind: str
    index: int
    layer: int
    order: int
    takes: tuple[str, ...]
    returns: tuple[str, ...]
    model: str
    module: nn.Module

    @property
    def is_layer(self) -> bool:
        return self.layer >= 0


@dataclass(frozen=True, eq=False)
class AttentionInfo:
    """A hookable attention layer: ``path`` on the denoiser, running number, whether it attends to the text, and the module."""

    path: str
    order: int
    is_cross: bool
    model: str
    module: nn.Module


@dataclass(frozen=True)
class Target:
    """What a plugin's ``check`` may look at before anything is touched."""

    pipe: Any
    family: Family
    denoisers: Mapping[str, nn.Module]
    blocks: tuple[BlockInfo, ...]
    given: Mapping[str, Any] = field(default_factory=dict)
    """What the plugin needs, by knob, fetched already."""


@runtime_checkable
class RunBound(Protocol):
    """A thing that a plugin was given and that fits certain runs only: an artefact, what a search found."""

    def ensure_run(self, scheduler: Any, steps: int, shape: tuple[int, ...], fits: Collection[str], guidance: float | None) -> None:
        """Raises ArtefactMismatch when one of these is another than it was made for, as far as ``fits`` names it."""
