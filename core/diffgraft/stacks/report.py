"""What each plugin did in a run, in numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from diffgraft.stacks.shown import report_html

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

    def __str__(self) -> str:
        """``called 4 times at denoise, 96 times at block; skipped 60 of 96 (62 %)``"""
        fired = ", ".join(f"{times(n)} at {point}" for point, n in self.fired.items())
        parts = [f"called {fired}" if fired else "not called in this run", *self.in_words()]
        if self.state_bytes >= 2**20 / 20:
            parts.append(f"state {self.state_bytes / 2**20:.1f} MiB")
        return "; ".join(parts)

    def in_words(self) -> list[str]:
        """The counts; what was skipped as a share of all, where what was computed is counted too."""
        words = []
        for key, branches in self.counts.items():
            whole = self.counts.get(key.replace("skipped", "computed")) if "skipped" in key else None
            if "computed" in key and key.replace("computed", "skipped") in self.counts:
                continue
            for branch, n in branches.items():
                text = f"{key} {n}"
                if whole is not None:
                    total = n + whole.get(branch, 0)
                    text += f" of {total} ({n / total:.0%})"
                words.append(text if len(branches) == 1 else f"{text} in {branch}")
        return words


@dataclass
class Report:
    """One ``pipe(...)`` call; of one in which no plugin was active only ``seconds``, ``completed`` and ``disabled`` are known.

    steps          ``scheduler.step`` calls
    denoiser_calls denoiser forwards that the pipeline asked for, per branch
    forwards       denoiser forwards that were really run, those of plugins included, per branch (the NFE of a method)
    counting       whether they were counted: only where a plugin hooks the denoiser, or something inside it
    shape          of the noisy sample in the first denoiser call, with its rows
    seconds        wall time of the whole call; 0 before the first
    completed      False when an exception or an interrupt ended it
    plugins        name -> :class:`PluginReport`, outermost first
    disabled       names of the plugins that were attached but switched off
    """

    steps: int = 0
    denoiser_calls: dict[str, int] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    counting: bool = False
    shape: tuple[int, ...] = ()
    seconds: float = 0.0
    completed: bool = False
    plugins: dict[str, PluginReport] = field(default_factory=dict)
    disabled: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        did = {name: (str(part).split("; "), part.notes) for name, part in self.plugins.items()}
        return report_html(str(self).partition("\n")[0], did, self.disabled)

    def log(self) -> None:
        """Tell the logger: each plugin's notes at INFO, the whole at DEBUG."""
        for name, part in self.plugins.items():
            for note in part.notes:
                _log.info("%s: %s", name, note)
        _log.debug("%s", self)

    def __str__(self) -> str:
        if not self.seconds:
            return "no run yet"
        state = "" if self.completed else ", did not finish"
        if not self.plugins:
            why = f"all were disabled ({', '.join(self.disabled)})" if self.disabled else "none is attached"
            return f"no plugin was active in the last run: {why}; it took {self.seconds:.2f} s{state}"
        none = "none" if self.counting else "not counted, as no plugin here hooks the denoiser"
        calls = per_branch(self.denoiser_calls) or none
        if self.forwards != self.denoiser_calls and self.denoiser_calls:
            calls += f", really run: {per_branch(self.forwards) or 'none'}"
        lines = [f"{self.steps} steps in {self.seconds:.2f} s{state}; denoiser calls: {calls}"]
        for name, part in self.plugins.items():
            lines.append(f"  {name}: {part}")
            lines += [f"    {note}" for note in part.notes]
        if self.disabled:
            lines.append(f"  disabled: {', '.join(self.disabled)}")
        return "\n".join(lines)


def per_branch(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{branch} {n}" for branch, n in counts.items())


def times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def tensor_bytes(value: Any, known: set[int]) -> int:
    """Bytes of all tensors held in a state object; what is met again was counted before (``known``: the ids of that)."""
    if isinstance(value, (int, float, str, nn.Module)) or id(value) in known:  # a model that a state points to is somebody else's
        return 0
    known.add(id(value))
    if isinstance(value, Tensor):
        return int(value.untyped_storage().nbytes())
    inside = value if isinstance(value, (Mapping, list, tuple)) else getattr(value, "__dict__", {})
    return sum(tensor_bytes(item, known) for item in (inside.values() if isinstance(inside, Mapping) else inside))
