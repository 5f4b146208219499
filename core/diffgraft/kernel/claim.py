"""Who runs a pipeline now: one call at a time, and nobody for ever.

A claim belongs to a function that is running, or to an object that somebody holds, not to a lock that somebody must remember to release:
where an interrupt kept them from letting go, the claim ends with the function or the object itself, and in a forked child with the thread
that is not there.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from types import FrameType
from typing import Any

from diffgraft.kernel.slots import Slot


class Claim:
    """Held by at most one running function, or one object."""

    def __init__(self) -> None:
        self._holder: tuple[int, FrameType | weakref.ref[Any]] | None = None

    def take(self, owner: Any = None) -> bool:
        """Claim it for the function that calls this, or for ``owner``; False where another one holds it."""
        with Slot.gate:
            if self.locked():
                return False
            self._holder = threading.get_ident(), sys._getframe(1) if owner is None else weakref.ref(owner)
            return True

    def locked(self) -> bool:
        """Whether its holder is still running, or there."""
        holder = self._holder
        return holder is not None and is_running(*holder)

    def release(self) -> None:
        self._holder = None


def is_running(thread: int, holder: FrameType | weakref.ref[Any]) -> bool:
    """Whether an object is still there, or a frame is being executed: Python refuses to clear it then. A finished one holds nothing that
    anybody needs."""
    if thread not in sys._current_frames():
        return False
    if isinstance(holder, weakref.ref):
        return holder() is not None
    try:
        holder.clear()
    except RuntimeError:
        return True
    return False


_claimed: weakref.WeakSet[Any] = weakref.WeakSet()


def clean_in_children(thing: Any) -> None:
    """Have ``thing.settle()`` called in every forked child, where the threads are not there that have opened something."""
    _claimed.add(thing)


def _settle_all() -> None:
    for thing in list(_claimed):
        thing.settle()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_settle_all)
