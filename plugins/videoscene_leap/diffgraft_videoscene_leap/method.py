"""The leap in the paper's symbols, free of diffusers.

A clean video z (the encoded draft) is noised to the leap level t and one call of the denoiser goes from there to the clean video:

    x_t = a z + s eps                       a^2 + s^2 = 1 (variance preserving), a + s = 1 (flow): `diffgraft.methods.starts.at_level`
    v = a eps - s x_0   ->   x_0 = a x_t - s v          (what the authors' ``video_gen`` calls the scheduler's "velocity" of v and x_t)
    u = eps - x_0       ->   x_0 = x_t - s u

With more steps the pipeline's own scheduler goes on from x_t.
"""

from __future__ import annotations

from torch import Tensor


def clean_of_v(x: Tensor, v: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """x_0 = a x_t - s v, of a variance-preserving model that predicts v."""
    return a * x - s * v


def clean_of_flow(x: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """x_0 = x_t - s u, of a flow."""
    return x - s * u


def flow_level(abar: Tensor) -> Tensor:
    """The level s of a flow, a = 1 - s, that is as noisy as a variance-preserving sample of ``abar``: s / a = sqrt((1 - abar) / abar)."""
    r = ((1 - abar) / abar).sqrt()
    return r / (1 + r)
