"""A second model inside a run of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffgraft.installed.family import Family
from diffgraft.kernel.onion import running


@contextmanager
def unhooked() -> Iterator[None]:
    """No hook of the run in progress fires inside, also not on blocks that both models share: the second model runs as it is."""
    with running(None):
        yield


def dtype_difference(pipe: Any, second: Any, family: Family) -> str | None:
    """Why a second pipeline's denoisers cannot be given what the first's are: another dtype, with the way out; or None."""
    for name in family.denoisers:
        here, there = getattr(pipe, name, None), getattr(second, name, None)
        if here is not None and there is not None and there.dtype != here.dtype:
            return f"its {name} is in {there.dtype}, this one in {here.dtype}; convert it with .to({here.dtype})"
    return None
