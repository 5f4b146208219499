"""After a run: whether every promise was kept, and which plugins saved nothing."""

from __future__ import annotations

import warnings
from typing import Any

from diffgraft.installed.errors import NeverFired
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.run import Run

IDLE = "inactive: nothing was saved"
"""How the note of a plugin begins that is there to save work and left nothing out."""


def ensure_fired(run: Run, result: Any) -> None:
    """Raises NeverFired when a point that a plugin implements was never reached, and the user did not end the call before it."""
    if run.stopped:
        return
    for entry in run.entries:
        part = run.report_of(entry)
        for point in entry.plugin.points():
            if point in {"run", "modules"} or point in run.reached:
                continue
            if point in {"block", "attention"} and (point not in run.promised or "denoiser" not in run.reached):
                continue  # it selected none, or an outer plugin answered every denoiser call
            if point == "control" and point not in run.promised:
                continue  # the pipeline has no ControlNet
            if point == "guide" and part.fired:
                continue  # guidance was off; the plugin's other points did their part
            if point == "guide" and run.reached:
                part.notes.append("inactive: guidance was off in this run, there was nothing to guide")
                continue
            raise NeverFired(_why(run, entry, point), result)
        if not part.fired and not part.notes and run.reached and entry.plugin.points() != ("modules",):
            by = next((run.answers[point] for point in ("denoise", "block", "run") if point in run.answers), None)
            part.notes.append(f"never called: {by.name if by else 'a plugin'} further out answered every call")
        if entry.plugin.is_neutral and not any("inactive" in note for note in part.notes):
            part.notes.append("inactive: it stands at its neutral settings, where it changes nothing")


def _why(run: Run, entry: Entry, point: str) -> str:
    """Who let a hook be unreached."""
    if (by := run.answers.get("run")) is not None:
        return (
            f"{by.name}: its run hook gave a result without calling next, so the pipeline did not run, and the {point!r} hook of "
            f"{entry.name} was never reached. What it gave is in this error's `result`."
        )
    return (
        f"{entry.name}: its {point!r} hook was never reached in this run, so it did nothing there. The picture is in this error's "
        "`result`. Something replaced what diffgraft wraps during the run (a callback? another library?)."
    )


def warn_of_idle(run: Run, warned: set[Entry]) -> None:
    """Warn of each plugin that saved nothing, once."""
    for entry, note in idle(run):
        if entry not in warned:
            warned.add(entry)
            warnings.warn(f"{entry.name}: {note}", UserWarning, stacklevel=4)


def idle(run: Run) -> list[tuple[Entry, str]]:
    """The plugins that are there to save work and saved none, each with the note that its report now has."""
    found = []
    for entry in run.entries:
        effects, part = entry.plugin.effects, run.report_of(entry)
        saves = effects.skips or "denoiser" in effects.replaces
        told = any("inactive" in note for note in part.notes)
        if not saves or told or run.stopped or not part.fired or entry in run.acted or "modules" in entry.plugin.points():
            continue
        does = f"skips {', '.join(sorted(effects.skips))}" if effects.skips else "replaces the denoiser"
        note = f"{IDLE}: it {does}, but in {run.report.steps} step(s) at these settings it left every call to what was there"
        part.notes.append(note)
        found.append((entry, note))
    return found
