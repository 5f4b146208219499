"""A volume in parts: some slices' share of a denoiser call, and what is measured of a volume, slice by slice or together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffgraft import DenoiseCall
from diffgraft.methods.problems import Problem
from torch import Tensor


def slices_of(call: DenoiseCall, begin: int, end: int) -> DenoiseCall:
    """The same call for slices begin to end (exclusive) of each guidance branch."""
    rows, n = call.sample.shape[0], len(call.branches)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            if not value.ndim or not len(value) or len(value) % rows:
                return value  # common to all rows
            return value.unflatten(0, (n, rows // n, -1))[:, begin:end].flatten(0, 2)
        if isinstance(value, dict):
            return {key: cut(item) for key, item in value.items()}
        return type(value)(map(cut, value)) if type(value) in (list, tuple) else value

    common = call.family.common
    return call.replace(**{name: cut(value) for name, value in call.arguments().items() if name not in common})  # type: ignore[no-any-return]


def in_parts(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int) -> Tensor:
    """f(x), which is asked about ``chunk`` rows at once (0: all): of f that treats each row by itself."""
    return f(x) if not 0 < chunk < len(x) else torch.cat([f(part) for part in x.split(chunk)])


class Measured:
    """A on volumes x [depth, c, h, w]: of each slice by itself, or of all together, of a problem of "videos" [1, c, depth, h, w].

    Args:
        chunk: slices measured at once, where any may be (0: all).
    """

    def __init__(self, problem: Problem, depth: int, chunk: int) -> None:
        self.problem, self.depth = problem, depth
        self.together = len(problem.shape) == 5
        _, channels, *_, height, width = problem.shape
        self.slice = (1, channels, height, width)
        self.any = not self.together and self._measures_any(torch.zeros(self.slice, device=problem.y.device))
        """Whether A takes any of the slices: a mask for each does not."""
        self.chunk = chunk if self.any else 0
        y = problem.y if self.together or len(problem.y) == depth else problem.y.expand(depth, *problem.y.shape[1:])
        self.back = self.AT(y)
        """AT y"""

    def _measures_any(self, flat: Tensor) -> bool:
        try:
            with torch.no_grad():
                return len(self.problem.operator.A(flat)) == 1
        except (RuntimeError, ValueError, IndexError):
            return False

    def A(self, x: Tensor) -> Tensor:
        return self.problem.operator.A(x.transpose(0, 1)[None] if self.together else x)

    def AT(self, y: Tensor) -> Tensor:
        x = self.problem.operator.AT(y)
        return x[0].transpose(0, 1) if self.together else x

    def gram(self, x: Tensor) -> Tensor:
        """AT A x."""
        return in_parts(lambda part: self.AT(self.A(part)), x, self.chunk)

    def residual(self, x: Tensor) -> Tensor:
        """Root mean square of A x - y, of each slice, or of the volume where it is measured together [1]."""
        y = self.problem.y
        if self.together or len(y) == 1:
            return self.problem.residual(x.transpose(0, 1)[None] if self.together else x)
        parts = range(0, self.depth, self.chunk or self.depth)
        errors = [self.A(x[i : i + (self.chunk or self.depth)]) - y[i : i + (self.chunk or self.depth)] for i in parts]
        return torch.cat([error.flatten(1).square().mean(1).sqrt() for error in errors])
