"""Measuring without others in the way: as many threads as there are cores, and a word when the machine is busy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffgraft.lab.terminal import say


@contextmanager
def steady(number: int | None, timed: bool = True) -> Iterator[str | None]:
    """Sets torch's threads for a long piece of work and says how many; gives the warning that the machine is busy, or None.

    ``timed``: whether times are measured, else nobody needs the warning.
    """
    from diffgraft.lab.machine import busy, threads

    warning = busy() if timed else None
    tell(warning)
    with threads(number) as count:
        say(f"{count} torch threads (--threads)", err=True)
        yield warning


def tell(warning: str | None) -> None:
    if warning is not None:
        say((f"warning: {warning}", "yellow"), err=True)
