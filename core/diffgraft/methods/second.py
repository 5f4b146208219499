"""A second model inside a run of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from diffgraft.kernel.onion import running


@contextmanager
def unhooked() -> Iterator[None]:
    """No hook of the run in progress fires inside, also not on blocks that both models share: the second model runs as it is."""
    with running(None):
        yield
