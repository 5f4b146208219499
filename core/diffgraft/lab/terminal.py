"""What the command line prints with: a console and progress bars."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

ROOMY = 70
"""Columns from which on a list has more than what one must know."""
SPACIOUS = 120
"""Columns from which on a table has room for texts beside each other."""


def console(wide: bool = False) -> Console:
    """A console as wide as the terminal; 160 columns where there is none; without end when asked for."""
    if wide:
        return Console(highlight=False, width=1000)
    made = Console(highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made = Console(highlight=False, width=160)
    return made


def escaped(text: Any) -> str:
    return escape(str(text))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar a phase; without a terminal one line a phase."""
    err = Console(stderr=True, highlight=False)
    if not err.is_terminal:
        seen: set[str] = set()

        def line(phase: str, done: int, total: int) -> None:
            if phase not in seen:
                seen.add(phase)
                err.print(f"{phase}...")

        yield line
        return
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)

        yield advance
