"""Key steps, prior noise and the layout of several steps in one batch (arXiv 2312.09608, section 3.3), without a model."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor

Named = Literal["paper", "100ls", "75ls", "s2", "pro"]
Keys = Named | int | tuple[int, ...]

PAPER_KEYS = (0, 1, 2, 3, 5, 10, 15, 25, 35)
"""t_key = {50, 49, 48, 47, 45, 40, 35, 25, 15} of 50 steps, counted from 0; its first seven are the paper's t_key of 20 steps."""
ALPHA = 0.003
"""The paper's alpha."""


def paper_keys(T: int) -> tuple[int, ...]:
    """The paper's key steps of a run of ``T`` steps, counted from 0.

    Up to 50 steps those of Stable Diffusion. Above that the paper's one longer set that skips in the middle: {100 ... 90, 85, 80, ...,
    15, 14 ... 1}, of DeepFloyd-IF's first stage with 100 steps: the first 11, every fifth, and the last 14.
    """
    return PAPER_KEYS if T <= 50 else tuple(i for i in range(T) if i <= 10 or i % 5 == 0 or i > T - 15)


def named_keys(name: Named, T: int) -> tuple[int, ...]:
    """The key steps that go by a name: the paper's, or one of the official code's lists.

    ``100ls`` and ``75ls``: the first 10, every fifth, and those after step 85 or 65. ``s2``: the first 20, those after step 40, and every
    second between. ``pro``: gaps that grow by one, 0, 2, 5, 9, 14, ... = (j^2 + 3 j) / 2.
    """
    if name == "paper":
        return paper_keys(T)
    if name == "s2":
        return tuple(i for i in range(T) if i < 20 or i > 40 or i % 2 == 0)
    if name == "pro":
        return tuple(i for i in range(T) if math.isqrt(9 + 8 * i) ** 2 == 9 + 8 * i)
    after = 85 if name == "100ls" else 65
    return tuple(i for i in range(T) if i < 10 or i > after or i % 5 == 0)


def next_key(i: int, T: int, keys: Keys) -> int:
    """The key step after step ``i`` of ``T``; T or more where none is left. ``keys`` an interval counts on from ``i``."""
    if isinstance(keys, int):
        return i + keys
    return min((key for key in (named_keys(keys, T) if isinstance(keys, str) else keys) if key > i), default=T)


def inject(z: Tensor, z_T: Tensor, t: Tensor, alpha: float, tau: float) -> Tensor:
    """z_t + alpha z_T if t < tau: prior noise injection. ``t`` 0-dim and ``tau`` in training timesteps; the value of t is not read."""
    return z + alpha * (t < tau) * z_T


def repeat_rows(x: Tensor, branches: int, m: int) -> Tensor:
    """The rows [branches x batch, ...] of ``x`` for ``m`` steps at once: [branches x m x batch, ...], so that branches stay whole."""
    return x.unflatten(0, (branches, -1)).unsqueeze(1).expand(-1, m, *[-1] * x.ndim).flatten(0, 2)


def repeat_times(t: Tensor, branches: int, rows: int) -> Tensor:
    """The times [m] of m steps for a batch that had ``rows`` rows: [branches x m x rows / branches], as :func:`repeat_rows` lays it out."""
    return t[None, :, None].expand(branches, -1, rows // branches).flatten()


def rows_of_step(x: Tensor, branches: int, m: int, k: int) -> Tensor:
    """The rows of step ``k`` of ``m``: the inverse of :func:`repeat_rows`."""
    return x.unflatten(0, (branches, m, -1))[:, k].flatten(0, 1)


def repeat_all(value: Any, branches: int, m: int) -> Any:
    """:func:`repeat_rows` of every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return repeat_rows(value, branches, m) if value.ndim else value
    if isinstance(value, dict):
        return {key: repeat_all(item, branches, m) for key, item in value.items()}
    return type(value)(repeat_all(item, branches, m) for item in value) if isinstance(value, (tuple, list)) else value


def holds_tensors(value: Any) -> bool:
    """Whether a tensor is somewhere in nested tuples, lists and dicts."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return any(map(holds_tensors, value)) if isinstance(value, (tuple, list)) else isinstance(value, Tensor)


def same(a: Any, b: Any) -> bool:
    """Whether two nested arguments are the same tensors (the same memory: no value is read) and equal plain values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a is b or (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def versions(value: Any) -> tuple[int, ...]:
    """How often each of the tensors in nested arguments was written to: the same memory may hold another prompt by now.

    Tensors that were made under ``inference_mode`` do not count it (0).
    """
    if isinstance(value, Tensor):
        return (0 if value.is_inference() else value._version,)
    if isinstance(value, dict):
        value = tuple(value.values())
    return sum(map(versions, value), ()) if isinstance(value, (tuple, list)) else ()
