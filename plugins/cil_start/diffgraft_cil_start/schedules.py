"""M / T, where nobody says it; the schedules that begin there are ``diffgraft.methods.late``'s."""

from __future__ import annotations

from diffgraft.methods.late import Kind

AUTHORS = {"times": 0.94, "flow": 0.94, "levels": 1 / 7}
"""M / T in the official settings: 940 of 1000 (DynamiCrafter, VideoCrafter), sigma 100 of 700 (SVD); flow models by formula."""


def share_of(start: float | None, kind: Kind) -> float:
    """M / T."""
    return AUTHORS[kind] if start is None else start
