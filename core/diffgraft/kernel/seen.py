"""What the checks of an attached plugin rest on, so that a run can tell in microseconds whether it is still so; and second pipelines, which
follow the first one's device and dtype. Objects are held against objects, and of each model a few weights against what they were."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.family import Family
from diffgraft.kernel.modular import PIPELINES
from diffgraft.kernel.weights import PLAIN, kept_by, middle_of, read

PROBES = 32
"""Weights of a model that are read at the beginning of a run."""


class Seen:
    """One pipeline as it was."""

    def __init__(self, pipe: Any, models: Mapping[str, bool]) -> None:
        """
        Args:
            models: names of the components whose dtype and device matter -> whether their weights do.
        """
        self._home: dict[str, Any] = vars(pipe)
        names = [name for name in pipe.config if not name.startswith("_") and name in self._home]
        self._parts = [(name, _reference(self._home[name]), _config(self._home[name])) for name in names]
        found = [(self._home.get(name), weights) for name, weights in models.items()]
        self._models = [SeenModel(model, weights) for model, weights in found if isinstance(model, nn.Module)]

    def holds(self) -> bool:
        """Whether all of it is still so."""
        for name, part, config in self._parts:
            now = self._home.get(name)
            if now is not part() or _config(now) is not config:
                return False
        return all(model.holds() for model in self._models)


class SeenModel:
    """One model: where some of its weights are, how they are kept, and what they are."""

    def __init__(self, model: nn.Module, weights: bool) -> None:
        self._root = weakref.ref(root_of(model))
        named = dict(root_of(model).named_parameters())
        names = list(named)
        chosen = names[:: -(-len(names) // (PROBES if weights else 4)) or 1]
        self._places = [tuple(name.split(".")) for name in chosen]
        self._readable = [weights and type(named[name]) in PLAIN and not named[name].is_meta for name in chosen]
        self._offsets = [middle_of(named[name]) for name, plain in zip(chosen, self._readable, strict=True) if plain]
        self._found = self._look()

    def holds(self) -> bool:
        return bool(self._look() == self._found)

    def _look(self) -> Any:
        root = self._root()
        found = [] if root is None else [_at(root, place) for place in self._places]
        kept = [None if x is None else (type(x), x.dtype, x.device, x.shape) for x in found]
        if kept != getattr(self, "_kept", kept) or None in kept:
            return None  # no need to read
        self._kept = kept
        plain = [weight for weight, readable in zip(found, self._readable, strict=True) if readable]
        others = [id(weight) for weight, readable in zip(found, self._readable, strict=True) if not readable]
        return others, read(plain, self._offsets)  # type: ignore[arg-type]


def _at(root: nn.Module, place: tuple[str, ...]) -> Tensor | None:
    """The parameter at a path, or None where there is none now."""
    *path, name = place
    module: nn.Module | None = root
    for part in path:
        module = module._modules.get(part) if module is not None else None
    return None if module is None else module._parameters.get(name)


def _reference(part: Any) -> Any:
    try:
        return weakref.ref(part)
    except TypeError:  # None, a tuple, a string
        return lambda: part


def _config(part: Any) -> Any:
    return getattr(part, "_internal_dict", None)


# second pipelines follow the first ----------------------------------------------------------------------------------------------------


def seconds_in(given: Mapping[str, Any]) -> list[Any]:
    """The second pipelines among what a plugin was given."""
    things = [one for value in given.values() for one in (value if isinstance(value, list) else [value])]
    return [thing for thing in things if isinstance(thing, PIPELINES)]


def follow_device(second: Any, device: torch.device) -> None:
    """Move a second pipeline to the device on which the first one runs now; where it is offloaded, accelerate moves its parts."""
    if second.device != device and not getattr(second, "_all_hooks", None):
        second.to(device)


def see(pipe: Any, family: Family, seconds: Sequence[Any], bound: bool) -> tuple[Seen, ...]:
    """What the checks of a plugin rest on now, of the pipeline and its second ones, which follow the first one's dtype.

    ``bound``: whether a thing that was made for these weights was given.
    """
    follow_dtypes(seconds, pipe, family)
    models = {**dict.fromkeys(family.denoisers, bound), "vae": bool(seconds)}
    return tuple(Seen(each, models) for each in (pipe, *seconds))


def follow_dtypes(seconds: Sequence[Any], first: Any, family: Family) -> None:
    """:func:`follow_dtype` of each that is of the first one's family; parts of another one may have the same names and nothing else."""
    for second in seconds:
        if type(second).__name__ in family.pipelines:
            follow_dtype(second, first)


def follow_dtype(second: Any, first: Any) -> None:
    """Bring each part of a second pipeline to the dtype that the first one's computes in. Quantised ones stay: their class converts."""
    parts = first.components
    for name, part in second.components.items():
        mine = parts.get(name)
        if isinstance(part, nn.Module) and isinstance(mine, nn.Module) and part is not mine and not kept_by(part):
            dtype = getattr(mine, "dtype", None)  # of one that is cast layer by layer: what it is cast to
            if dtype is not None and dtype.is_floating_point and dtype.itemsize > 1 and part.dtype != dtype:
                part.to(dtype=dtype)
