"""Modules that plugins exchange, and LoRA that they bring: the only things that stay between runs, because they must follow ``pipe.to``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.errors import Conflict, DiffgraftError
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import ModulesCall
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.slots import Slot


class Attached:
    """What a plugin is given that lies on the pipeline while the plugin is on (a LoRA). Taking it off may be done again."""

    def put_on(self, pipe: Any) -> None:
        raise NotImplementedError

    def take_off(self, pipe: Any) -> None:
        raise NotImplementedError


class Surgery:
    """What the plugins of one stack have exchanged, and the way back."""

    def __init__(self) -> None:
        self._swaps: dict[Entry, Sequence[Slot]] = {}
        self._attached: dict[Entry, Sequence[tuple[Attached, Any]]] = {}

    def operate(self, entry: Entry, pipe: Any, family: Family) -> None:
        """Let a plugin exchange its modules, all or none; nothing where it has no such hook or has done it."""
        things = [(one, pipe) for x in entry.given.values() for one in (x if isinstance(x, list) else [x]) if isinstance(one, Attached)]
        if entry in self._swaps or not (things or "modules" in entry.plugin.points()):
            return
        self._swaps[entry], self._attached[entry] = (), things
        try:
            for thing, _ in things:
                thing.put_on(pipe)
            if over := [other.name for other, slots in self._swaps.items() if not all(map(_lies_free, slots))]:
                raise Conflict(_TWO_LAYERS.format(entry.name, over[0]))
            if "modules" not in entry.plugin.points():
                return
            call = ModulesCall(None, None, {}, (), {})  # type: ignore[arg-type]
            call.entry, call.denoisers = entry, denoisers_of(pipe, family)
            call.swap = lambda parent, name, new: self._swap(entry, parent, name, new)
            entry.plugin.modules(call, lambda call: None)  # type: ignore[attr-defined]
        except BaseException:
            self.undo(entry)
            raise

    def _swap(self, entry: Entry, parent: nn.Module, name: str, new: nn.Module | nn.Parameter) -> None:
        home: Any = parent._parameters if isinstance(new, nn.Parameter) else parent._modules
        if name not in home:
            raise DiffgraftError(f"{entry.name}: {type(parent).__name__} has no submodule {name!r}; it has {', '.join(home)}")
        if under := [other.name for other, things in self._attached.items() if things and other is not entry and name == "base_layer"]:
            raise Conflict(_TWO_LAYERS.format(under[0], entry.name))
        for other, slots in self._swaps.items():
            if other is not entry and any(_meet(slot, home, name, parent) for slot in slots):
                raise Conflict(
                    f"{entry.name} and {other.name} both exchange {name!r} of a {type(parent).__name__}, and one would lose what the other "
                    "has put there; take one off"
                )
        slot = Slot(home, name, lambda: home[name])
        slot.put(new)
        self._swaps[entry] = (*self._swaps[entry], slot)  # first: what is not known here is never put back
        slot.open()

    def exchanged(self) -> Sequence[tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]]:
        """(module or weight that a plugin put in, the one that was there), in the order in which they were put in."""
        return [(slot.value, slot.inner) for slots in self._swaps.values() for slot in slots]

    def operated(self) -> bool:
        """Whether something of a plugin lies in the denoiser now."""
        return bool(self._swaps)

    def undo(self, entry: Entry) -> None:
        """Put back what a plugin has exchanged.

        Raises:
            Conflict: something was put over one of its modules; nothing is put back.
        """
        slots = self._swaps.get(entry, ())
        if over := next((slot for slot in slots if not _lies_free(slot)), None):
            raise Conflict(f"{entry.name} cannot be taken off: something (LoRA?) was put over its {over.key!r}; unload that first")
        for slot in reversed(slots):
            slot.close()
            follow(slot.inner, slot.value)  # the pipeline may have moved in the meantime
        for thing, pipe in reversed(self._attached.get(entry, ())):
            thing.take_off(pipe)
        self._attached.pop(entry, None)
        self._swaps.pop(entry, None)


_TWO_LAYERS = (
    "{} brings a LoRA for layers that {} exchanges: neither could be taken off without the other; take one off, or fuse the LoRA into the "
    "pipeline's weights (pipe.fuse_lora) before the other is put on"
)


def _lies_free(slot: Slot) -> bool:
    """Whether nobody has put something over what a plugin has exchanged."""
    return slot.is_open or slot.home.get(slot.key) is slot.inner or slot.inner is None


def _meet(slot: Slot, home: Any, name: str, parent: nn.Module) -> bool:
    """Whether another plugin's exchange is of the same module, or has brought the module in which the new one is to be made. What it has
    only wrapped is the pipeline's still."""
    return (slot.home is home and slot.key == name) or (_holds(slot.value, parent) and not _holds(slot.inner, parent))


def _holds(module: nn.Module | nn.Parameter | None, part: nn.Module) -> bool:
    """Whether ``part`` is somewhere in a module; a place for one may hold None, and a weight holds nothing."""
    return isinstance(module, nn.Module) and any(part is each for each in module.modules())


def follow(original: nn.Module | nn.Parameter | None, exchanged: nn.Module | nn.Parameter) -> None:
    """Move what was taken out to the device of what was in its place."""
    where = exchanged if isinstance(exchanged, nn.Parameter) else next(exchanged.parameters(), None)
    if where is not None and original is not None:
        (original if isinstance(original, nn.Module) else nn.ParameterList([original])).to(where.device)
