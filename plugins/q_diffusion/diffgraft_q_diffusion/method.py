"""Which steps of a run Q-Diffusion is calibrated on: a pure fact, free of diffusers."""

from __future__ import annotations


def kept_steps(total: int, timesteps: int) -> range:
    """The steps of a run that are calibrated on: each (total / timesteps)-th (algorithm 1)."""
    return range(0, total, max(total // timesteps, 1))
