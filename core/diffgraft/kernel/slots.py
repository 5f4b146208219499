"""The only file that writes to objects which are not ours.

A :class:`Slot` puts one wrapper into one instance's ``__dict__`` (or a module's ``_modules``) and takes it out again. It remembers whether
the key was there, so that closing deletes what opening made. Slots on one key stack, and close in any order: closing one below another
hands its predecessor up. Nothing is ever written to a class.

Opening and closing are one write each, made under one lock, and do nothing where they are done already: whoever was interrupted may do
them again. What is copied or pickled while a slot is open is what lies under it.
"""

from __future__ import annotations

import copy
import functools
import operator
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from typing import Any

from diffgraft.installed.errors import Unsupported

_ABSENT: Any = object()
"""Found by an open slot: nothing was there."""
_CLOSED: Any = object()
"""Found by a closed one."""


class Slot:
    """One value in one foreign mapping while open.

    ``inner`` is what the attribute gave before (a bound method, a processor, a module); a wrapper calls it.
    """

    gate = threading.RLock()
    """Held while any slot opens or closes: pipelines in several threads may share a module."""

    def __init__(self, home: MutableMapping[str, Any], key: str, inner: Callable[[], Any]) -> None:
        self.home = home
        self.key = key
        self.read_inner = inner
        self.value: Any = _ABSENT
        self.inner: Any = None
        self.found: Any = _CLOSED
        self.lead: Callable[..., Any] | None = None
        """Where a wrapper leads while its run is in progress."""
        self.copied: Callable[[Any], Any] | None = None
        """Of a method: gives what a deep copy of its object shows in this place, or None, its plain method."""

    def put(self, value: Any) -> None:
        """Set what this slot shows while it is open."""
        self.value = value
        value.__dict__[_TAG] = self

    @property
    def is_open(self) -> bool:
        """Whether the value is really there now: others may have put theirs over it, or thrown it away."""
        return self.found is not _CLOSED and self.home.get(self.key, _ABSENT) is self.value

    def open(self) -> None:
        """Show the value, over what others show there; nothing where it is shown already, also under another slot."""
        with Slot.gate:
            if self.is_open or self._over() is not None:
                return
            self.inner = self.read_inner()
            self.found = self.home.get(self.key, _ABSENT)
            self.home[self.key] = self.value

    def close(self) -> None:
        """Take the value out, wherever it lies; nothing where it is out already."""
        with Slot.gate:
            if self.is_open:
                if self.found is _ABSENT:
                    del self.home[self.key]
                else:
                    self.home[self.key] = self.found
            elif (over := self._over()) is not None:
                over.inner, over.found = self.inner, self.found
            # otherwise a foreign hand (offload hooks, set_attn_processor) has replaced it: what is there now is theirs
            self.found = _CLOSED  # `inner` stays: whoever still holds our wrapper gets through it

    def _over(self) -> Slot | None:
        """The open slot that lies directly over this one."""
        if self.found is _CLOSED:
            return None
        above = _slot_of(self.home.get(self.key))
        while above is not None and above.found is not self.value:
            above = _slot_of(above.found)
        return above

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(None), ()  # a copy of something that a slot shows is in no slot


def close_all(slots: Sequence[Slot]) -> None:
    """Close slots, the last one first. An interrupt in the middle is raised when all are closed."""

    def close() -> None:
        for slot in reversed(slots):
            slot.close()
            slot.lead = slot.copied = None

    surely(close)


def surely(undo: Callable[[], Any]) -> None:
    """Call ``undo``, which may be called again: once more where an interrupt came into it, which is then raised."""
    try:
        undo()
    except BaseException:
        undo()
        raise


@contextmanager
def opened(slots: Sequence[Slot]) -> Iterator[None]:
    """Slots that are open inside."""
    try:
        for slot in slots:
            slot.open()
        yield
    finally:
        close_all(slots)


def free_the_gate() -> None:
    """Let go of the gate where an interrupt kept this thread from it; only for a thread that opens and closes nothing now."""
    while Slot.gate._is_owned():  # type: ignore[attr-defined]
        Slot.gate.release()


def _new_gate() -> None:
    Slot.gate = threading.RLock()


if hasattr(os, "register_at_fork"):  # in a forked child the thread that held it is not there
    os.register_at_fork(after_in_child=_new_gate)


_TAG = "_diffgraft_slot"


def _slot_of(value: Any) -> Slot | None:
    return getattr(value, "__dict__", {}).get(_TAG)


class Method(functools.partial):
    """A wrapper in the place of ``target.name``. A copy or a pickle of it is what it stands for: that method of the copy."""

    target: Any
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        slot, owner = _slot_of(self), memo.get(id(self.target))
        if slot is not None and slot.copied is not None and owner is not None and (value := slot.copied(owner)) is not None:
            return value
        function, arguments = self.__reduce_ex__(2)
        return function(*copy.deepcopy(arguments, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        below = underneath(self)
        return (getattr, (self.target, self.name)) if below is _ABSENT or below is self else instead(below)


class MethodSlot(Slot):
    """A slot on a method of one instance."""

    def __init__(self, target: Any, name: str) -> None:
        super().__init__(target.__dict__, name, lambda: getattr(target, name))
        self.target = target

    def put(self, value: Callable[..., Any]) -> None:
        method = Method(value)
        functools.update_wrapper(method, value)
        method.target, method.name = self.target, self.key
        super().put(method)


def method_slot(target: Any, name: str) -> Slot:
    """A slot on the method ``name`` of one instance."""
    return MethodSlot(target, name)


def shown_on(owner: Any, name: str, value: Any) -> Slot:
    """A slot that shows ``value`` as an attribute of one instance."""
    slot = Slot(owner.__dict__, name, lambda: owner.__dict__[name])
    slot.put(value)
    return slot


def instead(value: Any) -> tuple[Any, ...]:
    """For ``__reduce_ex__`` of what stands in for ``value``: a copy or a pickle holds that."""
    return operator.getitem, ((value,), 0)


class StandIn:
    """To ``isinstance`` and attribute access it is the thing that it stands for; a copy or a pickle holds that thing."""

    def __init__(self, thing: Any) -> None:
        self.__dict__["_thing"] = thing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_thing"], name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return instead(self.__dict__["_thing"])

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_thing"])


def underneath(value: Any) -> Any:
    """What is there without slots, where ``value`` is seen; ``_ABSENT`` where that is nothing."""
    while (slot := _slot_of(value)) is not None and slot.found is not _CLOSED:
        value = slot.found
    return value


def plain_state(home: Mapping[str, Any]) -> dict[str, Any]:
    """An object's ``__dict__`` as it is without slots."""
    state = {key: underneath(value) for key, value in list(home.items())}
    return {key: value for key, value in state.items() if value is not _ABSENT}


def uncover(originals: Iterable[Any], memo: Mapping[int, Any]) -> None:
    """After a deep copy: take out of the copies what only slots have put into their originals."""
    for original in originals:
        twin = memo.get(id(original))
        for key, value in list(vars(original).items()) if twin is not None else ():
            if underneath(value) is _ABSENT:
                vars(twin).pop(key, None)


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
    return (object.__new__, (cls,), plain_state(reduced[2]), *reduced[3:])


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
    elif not part and not follows(scheduler):
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


def set_alike(scheduler: Any, like: Any) -> None:
    """Set a copy of a scheduler to the very schedule of ``like``, with all that this has made of it; slots stay."""
    home = scheduler.__dict__
    state = copy.deepcopy(plain_state(like.__dict__))
    home.update({key: value for key, value in state.items() if _slot_of(home.get(key)) is None})


STRIDED = frozenset({"DDIMScheduler", "DDIMParallelScheduler", "CogVideoXDDIMScheduler"})
"""Schedulers that go from t to t - T // num_inference_steps, whatever their timesteps are."""


def is_strided(scheduler: Any) -> bool:
    """Whether the scheduler is one of :data:`STRIDED` or made from one."""
    return any(cls.__name__ in STRIDED for cls in type(scheduler).__mro__)


def follows(scheduler: Any) -> bool:
    """Whether the scheduler can take an edited schedule: it has sigmas, or keeps timesteps that were given, or goes by strides (DDIM)."""
    given = any(getattr(scheduler, name, None) is not None for name in ("sigmas", "custom_timesteps"))
    return given or is_strided(scheduler)


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
    before = scheduler.num_inference_steps  # an interrupt on the way back does no harm: `set_timesteps` sets it anew in the next run
    scheduler.num_inference_steps = Fraction(scheduler.config.num_train_timesteps, stride)
    try:
        yield
    finally:
        scheduler.num_inference_steps = before


def place_in(whole: Any, view: Any) -> int | None:
    """Where in ``whole`` a view of it begins, by their storage: no value is compared, so equal ones confuse nobody. None: it is no view."""
    if view.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return None
    return int((view.storage_offset() - whole.storage_offset()) // max(whole.stride(0), 1))


def is_part(timesteps: Any, of: Any) -> bool:
    """Whether ``timesteps`` is a slice ``of[a:b]``. A part of a schedule keeps the schedule's step size."""
    return bool(place_in(of, timesteps) is not None and timesteps.stride() == of.stride() and len(timesteps) <= len(of))


def left_behind(timesteps: Any, of: Any) -> int:
    """How many of the timesteps ``of`` come after ``timesteps``, where that is a part of them; else 0."""
    if not len(timesteps) or not is_part(timesteps, of):
        return 0
    return len(of) - len(timesteps) - (place_in(of, timesteps) or 0)


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


def set_requires_grad(parameters: Iterable[Any], value: bool) -> None:
    """Switch the gradient of parameters off for a while, and on again; what they have collected in ``grad`` stays as it is."""
    for parameter in parameters:
        parameter.requires_grad_(value)


def write_global(owner: Any, name: str, value: Any) -> None:
    """Write an attribute that diffusers itself changes process-wide (the attention backend)."""
    setattr(owner, name, value)


def keep(home: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Leave ``value`` in a foreign mapping, where it was before another library wrote there (the module that a LoRA layer wrapped)."""
    with Slot.gate:
        home[key] = value


def forget(home: MutableMapping[str, Any], key: str) -> None:
    """Delete a key of a foreign mapping that another library has made there; nothing where it is gone."""
    with Slot.gate:
        home.pop(key, None)
