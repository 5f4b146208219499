"""At which steps the whole U-Net runs (arXiv 2312.00858, section 3.3), without a model."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


@lru_cache
def nonuniform_keys(T: int, N: int, p: float, c: int) -> tuple[int, ...] | None:
    """The steps that run the whole U-Net in non-uniform 1:N inference (eq. 7), or None where no power in (1, p] gives k of them.

    k = ceil(T / N) points; l = linspace((-c)^(1/p), (T - c)^(1/p)); steps = unique(int(l^p)) + c. Step 0 always is one. A negative number's
    root is its complex principal root and ``int`` takes the real part, as in the authors' code (a signed root gives other steps). Where
    two points fall on one step, p is lowered by 0.02 until there are k steps.
    """
    k = math.ceil(T / N)
    while p > 1:
        points = np.linspace((-c) ** (1 / p), (T - c) ** (1 / p), k + 1) ** p
        keys = (0, *(int(i) + c for i in np.unique(np.real(points).astype(np.int32))[1:-1]))
        if len(keys) == k:
            return keys
        p -= 0.02
    return None
