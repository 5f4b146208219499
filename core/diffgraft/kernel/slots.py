"""The only file that writes to objects which are not ours.

A :class:`Slot` puts one wrapper into one instance's ``__dict__`` (or a module's ``_modules``) and takes it out again. It remembers whether
the key was there, so that closing deletes what opening made. Slots on one key stack, and close in any order: closing one below another
hands its predecessor up. Nothing is ever written to a class.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any

from diffgraft.kernel.errors import Unsupported

_ABSENT: Any = object()


class Slot:
    """One value in one foreign mapping while open.

    ``inner`` is what the attribute gave before (a bound method, a processor, a module); a wrapper calls it.
    """

    def __init__(self, home: MutableMapping[str, Any], key: str, inner: Callable[[], Any]) -> None:
        self.home = home
        self.key = key
        self.read_inner = inner
        self.value: Any = _ABSENT
        self.inner: Any = None
        self.found: Any = _ABSENT
        self.lead: Callable[..., Any] | None = None
        """Where a wrapper leads while its run is in progress."""

    def put(self, value: Any) -> None:
        """Set what this slot shows while it is open."""
        self.value = value
        _tag(value, self)

    @property
    def is_open(self) -> bool:
        """Whether the value is really there now: others may have put theirs over it, or thrown it away."""
        return self.home.get(self.key, _ABSENT) is self.value

    def open(self) -> None:
        if self.is_open:
            return
        self.inner = self.read_inner()
        self.found = self.home.get(self.key, _ABSENT)
        self.home[self.key] = self.value

    def close(self) -> None:
        if self.is_open:
            if self.found is _ABSENT:
                del self.home[self.key]
            else:
                self.home[self.key] = self.found
        else:
            above = self.home.get(self.key)
            while (slot := _slot_of(above)) is not None:
                if slot.found is self.value:  # ours is under another slot: hand it what we found
                    slot.found, slot.inner = self.found, self.inner
                    break
                above = slot.found
            # otherwise a foreign hand (offload hooks, set_attn_processor) has replaced it: what is there now is theirs
        self.found = _ABSENT  # `inner` stays: whoever still holds our wrapper gets through it


_TAG = "_diffgraft_slot"


def _tag(value: Any, slot: Slot) -> None:
    value.__dict__[_TAG] = slot


def _slot_of(value: Any) -> Slot | None:
    return getattr(value, "__dict__", {}).get(_TAG)


def method_slot(target: Any, name: str) -> Slot:
    """A slot on the method ``name`` of one instance."""
    return Slot(target.__dict__, name, lambda: getattr(target, name))


def wraps_method(target: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give ``function`` the name and signature of ``target.name``: diffusers inspects both."""
    return functools.update_wrapper(function, getattr(target, name))


def class_for_one(base: type, body: Mapping[str, Any]) -> type:
    """A subclass of ``base`` for one object: same name, place and text, so that it passes for ``base`` wherever a class is named."""
    told = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {**told, **body})


def reduced_as(pipe: Any, cls: type, protocol: Any) -> tuple[Any, ...]:
    """What a pickle of ``pipe`` holds when it is to be read as a plain ``cls``: its reader may have no diffgraft."""
    reduced: Any = object.__reduce_ex__(pipe, max(int(protocol), 2))
    return (object.__new__, (cls,), *reduced[2:])


def set_class(pipe: Any, cls: type) -> None:
    """Give one pipeline another class of the same layout, past its own ``__setattr__``."""
    object.__setattr__(pipe, "__class__", cls)


def write_schedule(scheduler: Any, timesteps: Any, sigmas: Any) -> list[int]:
    """Put an edited schedule, or a part of the scheduler's own (slices of its timesteps and sigmas), into a scheduler.

    Returns how far each step goes down where the scheduler would not follow by itself (see :func:`striding`), else nothing.

    Raises:
        Unsupported: the scheduler derives its step size from ``num_inference_steps`` alone and keeps a plan of the steps (PNDM), so it
            cannot follow the edit; or it moves between whole timesteps (DDIM), and these are not falling whole numbers.
    """
    name = type(scheduler).__name__
    part = is_part(timesteps, scheduler.timesteps)
    has_sigmas = getattr(scheduler, "sigmas", None) is not None
    custom = getattr(scheduler, "custom_timesteps", None) is not None
    strides: list[int] = []
    if is_strided(scheduler) and not part:
        strides = strides_of(scheduler, timesteps)
    elif not has_sigmas and not custom and not part:
        raise Unsupported(
            f"{name} cannot follow an edited schedule: it steps by num_train_timesteps / num_inference_steps; use a sigma scheduler"
        )
    if has_sigmas and len(sigmas) != len(scheduler.sigmas) - len(scheduler.timesteps) + len(timesteps):
        raise Unsupported(f"{name}: {len(timesteps)} timesteps do not go with {len(sigmas)} sigmas")
    scheduler.timesteps = timesteps
    if has_sigmas:
        scheduler.sigmas = sigmas
    if custom:
        scheduler.custom_timesteps = True
    if custom or not part:
        scheduler.num_inference_steps = len(timesteps)
    return strides


STRIDED = frozenset({"DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"})
"""Schedulers that go from t to t - T // num_inference_steps, whatever their timesteps are."""


def is_strided(scheduler: Any) -> bool:
    """Whether the scheduler is one of :data:`STRIDED` or made from one."""
    return any(cls.__name__ in STRIDED for cls in type(scheduler).__mro__)


def strides_of(scheduler: Any, timesteps: Any) -> list[int]:
    """How far each step of an edited schedule goes down; the last goes past 0, to the clean sample. Reads the values: once a run.

    Raises:
        Unsupported: they are not falling whole numbers of 0 to T - 1.
    """
    values = [float(t) for t in timesteps.tolist()]
    T = int(scheduler.config.num_train_timesteps)
    falling = all(a > b for a, b in pairwise(values))
    if not values or not falling or any(t != int(t) or not 0 <= t < T for t in values):
        raise Unsupported(f"{type(scheduler).__name__} moves between falling whole timesteps of 0 to {T - 1}, and cannot follow {values}")
    return [int(a - b) for a, b in pairwise(values)] + [T]


@contextmanager
def striding(scheduler: Any, stride: int | None) -> Iterator[None]:
    """For one step: let a strided scheduler go ``stride`` timesteps down (None: as far as it goes by itself).

    It takes T // num_inference_steps, and no whole number of steps gives every stride; a fraction does, exactly.
    """
    if stride is None:
        yield
        return
    before = scheduler.num_inference_steps
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, stride)
    try:
        yield
    finally:
        scheduler.num_inference_steps = before


def is_part(timesteps: Any, of: Any) -> bool:
    """Whether ``timesteps`` is a slice ``of[a:b]``: a view of the same storage. A part of a schedule keeps the schedule's step size."""
    same = timesteps.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()
    return bool(same and timesteps.stride() == of.stride() and len(timesteps) <= len(of))


def left_behind(timesteps: Any, of: Any) -> int:
    """How many of the timesteps ``of`` come after ``timesteps``, where that is a part of them; else 0."""
    if not len(timesteps) or not is_part(timesteps, of):
        return 0
    return int(len(of) - len(timesteps) - (timesteps.storage_offset() - of.storage_offset()) // max(of.stride(0), 1))


def add_note(error: BaseException, text: str) -> None:
    """``error.add_note`` (Python 3.11): what the traceback shows behind the error's own text."""
    notes = getattr(error, "__notes__", None)
    if notes is None:
        notes = error.__notes__ = []  # type: ignore[attr-defined]
    if text not in notes:
        notes.append(text)


def interrupt(pipe: Any) -> None:
    """Stop a pipeline as diffusers' users do: its loop makes no further step."""
    pipe._interrupt = True


def set_requires_grad(parameter: Any, value: bool) -> None:
    """Switch a parameter's gradient off for a while, and on again; what it has collected in ``grad`` stays as it is."""
    parameter.requires_grad_(value)


def write_global(owner: Any, name: str, value: Any) -> Any:
    """Write an attribute that diffusers itself changes process-wide (the attention backend); returns what was there."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    return before
