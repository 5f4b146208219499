"""The step from pure noise to the noisiest level that a model was trained on, in the paper's symbols; free of diffusers.

A variance-preserving schedule ends at abar_T > 0: in training the noisiest sample is sqrt(abar_T) x_0 + sqrt(1 - abar_T) eps, in
sampling it is eps alone. Where abar = 0 a v-prediction v = sqrt(abar) eps - sqrt(1 - abar) x_0 is -x_0, whatever eps is; so a network psi
that predicts v from pure noise n tells x_0, and the posterior of DDPM from abar = 0 to abar_T, in which n has no part, is

    x_T = sqrt(abar_T) x_0^ + sqrt(1 - abar_T) n_2,      x_0^ = -psi(n, c),   n_2 ~ N(0, I)
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Std = Literal["deviation", "variance"]


def guided(v0: Tensor, v: Tensor, w: float) -> Tensor:
    """v_0 + w (v - v_0)."""
    return v0 + w * (v - v0)


def clean(v: Tensor) -> Tensor:
    """x_0^ of a v-prediction at abar = 0: sqrt(abar) n - sqrt(1 - abar) v."""
    return -v


def share_of_noise(a: Tensor, s: Tensor, std: Std) -> Tensor | float:
    """What n_2 is multiplied by before it gets the level's own noise s (a, s 0-dim, of a sample a x_0 + s eps).

    1, so that n_2 has the deviation sqrt(1 - abar_T). The official code gives it the variance 1 - abar_T in that place: as much again.
    """
    return 1.0 if std == "deviation" else s / (a * a + s * s).sqrt()
