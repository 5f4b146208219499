"""What each plugin did in a run, in numbers."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

_log = logging.getLogger(__name__)


@dataclass
class PluginReport:
    """One plugin's part: ``fired`` calls per hook point, ``counts`` per key and branch, ``notes`` in words, tensors it recorded."""

    fired: dict[str, int] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    state_bytes: int = 0
    records: dict[str, Any] = field(default_factory=dict)

    def count(self, key: str, branch: str, n: int = 1) -> None:
        per_branch = self.counts.setdefault(key, {})
        per_branch[branch] = per_branch.get(branch, 0) + n

    def total(self, key: str) -> int:
        """Sum of a counter over the branches; 0 when it was never counted."""
        return sum(self.counts.get(key, {}).values())


@dataclass
class Report:
    """One ``pipe(...)`` call.

    steps          ``scheduler.step`` calls
    denoiser_calls denoiser forwards that the pipeline asked for, per branch
    shape          of the noisy sample in the first denoiser call, with its rows
    seconds        wall time of the whole call
    completed      False when an exception or an interrupt ended it
    plugins        name -> :class:`PluginReport`, outermost first
    """

    steps: int = 0
    denoiser_calls: dict[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    seconds: float = 0.0
    completed: bool = False
    plugins: dict[str, PluginReport] = field(default_factory=dict)

    def log(self) -> None:
        """Tell the logger: each plugin's notes at INFO, the whole at DEBUG."""
        for name, part in self.plugins.items():
            for note in part.notes:
                _log.info("%s: %s", name, note)
        _log.debug("%s", self)

    def __str__(self) -> str:
        calls = ", ".join(f"{branch} {n}" for branch, n in self.denoiser_calls.items()) or "not counted"
        state = "" if self.completed else ", did not finish"
        lines = [f"{self.steps} steps in {self.seconds:.2f} s{state}; denoiser calls: {calls}"]
        for name, part in self.plugins.items():
            counts = "; ".join(
                f"{key} " + ", ".join(f"{n} ({branch})" for branch, n in branches.items())
                for key, branches in part.counts.items()
            )
            fired = ", ".join(f"{point} x{n}" for point, n in part.fired.items()) or "never called"
            lines.append(f"  {name}: {counts or 'nothing counted'} [{fired}; state {part.state_bytes / 2**20:.1f} MiB]")
            lines += [f"    {note}" for note in part.notes]
        if not self.plugins:
            lines.append("  no plugin was active")
        return "\n".join(lines)
