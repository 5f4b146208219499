"""What a plugin's artefact, inversion or finding holds, declared as data and checked before anything is touched.

    Need("artefact", "artefact", holds=Holds(
        tensors={"error": Values(("T", "W"), low=0, infinite=True), "K.*": Values(("T", "W", "C"))},
        facts=Facts,                                     # a TypedDict: plain JSON, further keys are nobody's business
    ))

A letter stands for one size in the whole file, ``...`` for any further axes, the same in the whole file. A right checksum says that a file
is what somebody wrote, not that it makes sense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import EllipsisType
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from diffgraft.installed.foreign import brief


@dataclass(frozen=True)
class Values:
    """A tensor: its axes (none: one number), its dtypes, the range of its values, and whether it may be missing.

    Not a number is never allowed, infinite only where that is said.
    """

    axes: tuple[str | EllipsisType, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    low: float = -torch.inf
    high: float = torch.inf
    infinite: bool = False
    optional: bool = False

    def fault(self, value: Tensor, sizes: dict[Any, Any]) -> str | None:
        """What is wrong with a tensor, or None; ``sizes`` of the letters so far, which it adds to."""
        if value.dtype not in self.dtypes:
            return f"is {name_of(value.dtype)}, not {' or '.join(map(name_of, self.dtypes))}"
        if not self.fits(tuple(value.shape), sizes):
            known = ", ".join(f"{name_of(axis)} = {size}" for axis, size in sizes.items())
            return f"has shape {tuple(value.shape)}, not [{', '.join(map(name_of, self.axes))}] with {known}"
        if bool(value.isnan().any()):
            return "holds NaN"
        if not self.infinite and not bool(value.isfinite().all()):
            return "holds infinite values"
        if bool((value < self.low).any()) or bool((value > self.high).any()):
            return f"holds {float(value.min()):g} to {float(value.max()):g}, outside of {self.low:g} to {self.high:g}"
        return None

    def fits(self, shape: tuple[int, ...], sizes: dict[Any, Any]) -> bool:
        """Whether a shape is one of these axes; none of them is empty."""
        axes = self.axes
        if axes and axes[-1] is ...:
            head = len(axes) - 1
            if len(shape) < head or sizes.setdefault(..., shape[head:]) != shape[head:] or 0 in shape:
                return False
            axes, shape = axes[:-1], shape[:head]
        if len(axes) != len(shape) or 0 in shape:
            return False
        return all(sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True))


@dataclass(frozen=True)
class Holds:
    """What is in the file.

    tensors  name -> :class:`Values`; a name with ``*`` stands for any number of tensors, and none that is named in no way is allowed
    facts    a TypedDict of the facts that the plugin reads, or None
    also     what else must hold: (tensors, facts) -> what is wrong, or None
    """

    tensors: Mapping[str, Values] = field(default_factory=dict)
    facts: Any = None
    also: Callable[[Mapping[str, Tensor], Mapping[str, Any]], str | None] = lambda tensors, facts: None

    def fault(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
        """What is wrong with a file's content, or None."""
        sizes: dict[Any, Any] = {}
        left = dict(tensors)
        for pattern, values in self.tensors.items():
            names = sorted(name for name in left if fnmatchcase(name, pattern))
            if not names and not values.optional and "*" not in pattern:
                return f"the tensor {pattern!r} is missing"
            for name in names:
                if why := values.fault(left.pop(name), sizes):
                    return f"the tensor {name!r} {why}"
        if left:
            return f"the tensor {min(left)!r} has no place in it"
        if self.facts is not None:
            try:
                TypeAdapter(self.facts).validate_python(dict(facts), strict=True)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                return f"its fact {where} = {brief(first['input'], 60)}: {first['msg']}"
        return self.also(tensors, facts)


def name_of(what: Any) -> str:
    """A dtype or an axis."""
    return "..." if what is ... else str(what).removeprefix("torch.")
