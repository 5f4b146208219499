"""What the command line prints with, and nothing prints past it: whatever a text holds, it is shown as text (`installed/foreign.py`)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from diffgraft.installed.foreign import plain

ROOMY = 70
"""Columns from which on a list has more than what one must know."""
LINES = 30.0
"""Seconds between two lines of progress where there is no terminal."""
SPACIOUS = 120
"""Columns from which on a table has room for texts beside each other."""


class Screen(Console):
    """A rich console to which a string is what it says: no markup, no names of emoji, nothing that a terminal obeys. Colours come by
    `coloured`."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Everything that is printed as a string, cells and titles of tables too, comes through here."""
        return super().render_str(plain(text, lines=True), **{**options, "markup": False, "emoji": False, "highlight": False})


def console(wide: bool = False, err: bool = False) -> Screen:
    """A console as wide as the terminal; 160 columns where there is none; without end when asked for."""
    if wide:
        return Screen(highlight=False, width=1000, stderr=err)
    made = Screen(highlight=False, stderr=err)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Screen(highlight=False, width=160, stderr=err)
    return made


def coloured(*parts: str | tuple[str, str]) -> Text:
    """A text for a `Screen`, in parts: a string, or (string, style)."""
    return Text.assemble(*(plain(part, lines=True) if isinstance(part, str) else (plain(part[0], lines=True), part[1]) for part in parts))


def say(*parts: str | tuple[str, str], err: bool = False) -> None:
    """A line, in parts: a string, or (string, colour)."""
    said = (plain(p, lines=True) if isinstance(p, str) else typer.style(plain(p[0], lines=True), fg=p[1]) for p in parts)
    typer.echo("".join(said), err=err)


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar a phase; without a terminal one line a phase, and while it lasts one every half a minute."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    err = console(err=True)
    if not err.is_terminal:
        told: dict[str, float] = {}

        def line(phase: str, done: int, total: int) -> None:
            now = time.monotonic()
            if phase not in told:
                err.print(f"{phase}...")
            elif now - told[phase] >= LINES:
                err.print(f"{phase}: {done} of {total}")
            else:
                return
            told[phase] = now

        yield line
        return
    name = TextColumn("{task.description:<10}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(plain(phase), total=total)
            bars.update(tasks[phase], completed=done)

        yield advance
