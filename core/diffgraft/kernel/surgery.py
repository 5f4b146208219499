"""Modules that plugins exchange, and LoRA that they bring: the only things that stay between runs, because they must follow ``pipe.to``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import nn

from diffgraft.installed.anatomy import denoisers_of, root_of
from diffgraft.installed.errors import Conflict, DiffgraftError
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import ModulesCall
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.slots import Slot, keep


class Attached:
    """What a plugin is given that lies on the pipeline while the plugin is on (a LoRA). Taking it off may be done again."""

    def put_on(self, pipe: Any) -> None:
        raise NotImplementedError

    def take_off(self, pipe: Any) -> None:
        raise NotImplementedError


@dataclass
class Done:
    """What one plugin has attached to models and exchanged there, and which LoRA were fused before (:func:`_fused`). Models that the user
    replaces are not held on to."""

    refs: Sequence[ref[nn.Module]]
    things: Sequence[tuple[Attached, Any]]
    fused: frozenset[Any]
    slots: Sequence[Slot] = ()

    @property
    def models(self) -> list[nn.Module]:
        return [model for each in self.refs if (model := each()) is not None]

    def places(self) -> dict[int, list[tuple[Any, str]]]:
        """Where each module lies by now, by its id: a LoRA that comes over it or is taken off moves it."""
        found: dict[int, list[tuple[Any, str]]] = {}
        homes = [module._modules for model in self.models for module in model.modules()]
        for home, key, child in [(each, *item) for each in homes for item in each.items()]:
            found.setdefault(id(child), []).append((home, key))
        return found


class Surgery:
    """What the plugins of one stack have exchanged, and the way back."""

    def __init__(self) -> None:
        self._done: dict[Entry, Done] = {}

    def operate(self, entry: Entry, pipe: Any, family: Family) -> None:
        """Let a plugin exchange its modules, all or none; nothing where it has no such hook or has done it."""
        things = [(one, pipe) for x in entry.given.values() for one in (x if isinstance(x, list) else [x]) if isinstance(one, Attached)]
        if entry in self._done or not (things or "modules" in entry.plugin.points()):
            return
        models = [root_of(denoiser) for denoiser in denoisers_of(pipe, family).values()]
        self._done[entry] = Done([*map(ref, models)], things, _fused(models))
        try:
            for thing, _ in things:
                thing.put_on(pipe)
            if over := [other.name for other, done in self._done.items() if not all(map(_lies_free, done.slots))]:
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
        others = [(other.name, done) for other, done in self._done.items() if other is not entry]
        if under := [other for other, done in others if done.things and name == "base_layer"]:
            raise Conflict(_TWO_LAYERS.format(under[0], entry.name))
        if met := [other for other, done in others if any(_meet(slot, home, name, parent) for slot in done.slots)]:
            raise Conflict(
                f"{entry.name} and {met[0]} both exchange {name!r} of a {type(parent).__name__}, and one would lose what the other has put "
                "there; take one off"
            )
        slot = Slot(home, name, lambda: home[name])
        slot.put(new)
        self._done[entry].slots = (*self._done[entry].slots, slot)  # first: what is not known here is never put back
        slot.open()

    def exchanged(self) -> Sequence[tuple[nn.Module | nn.Parameter, nn.Module | nn.Parameter]]:
        """(module or weight that a plugin put in, the one that was there), in the order in which they were put in."""
        return [(slot.value, slot.inner) for done in self._done.values() for slot in done.slots]

    def operated(self) -> bool:
        """Whether something of a plugin lies in the denoiser now."""
        return bool(self._done)

    def ensure_free(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """These plugins; raises Conflict where what one has exchanged cannot be put back without losing what others have done since."""
        loras = {getattr(thing, "name", None) for done in self._done.values() for thing, _ in done.things}
        for entry, done in [(entry, self._done[entry]) for entry in entries if entry in self._done]:
            places, why = done.places(), ""
            for slot in done.slots:
                if not _lies_free(slot) and id(slot.value) not in places:
                    why = f"something was put over its {slot.key!r}; take that away first"
                elif _loras_in(slot.value) - _loras_in(slot.inner) - loras:
                    why = f"a LoRA lies in its {slot.key!r} and would be lost with it; unload that first (pipe.unload_lora_weights())"
            if done.fused ^ _fused(done.models) and any(map(_hides_weights, done.slots)):
                why = "a LoRA was fused into its weights, or out of them; undo that first (pipe.unfuse_lora(), pipe.fuse_lora())"
            if why:
                raise Conflict(f"{entry.name} cannot be taken off: {why}")
        return entries

    def undo(self, entry: Entry) -> None:
        """Put back what a plugin has exchanged, wherever it lies by now; nothing where :meth:`ensure_free` finds why not."""
        if (done := self._done.get(entry)) is None:
            return
        self.ensure_free([entry])
        places = done.places()
        for slot in reversed(done.slots):
            slot.close()
            for home, key in places.get(id(slot.value), ()):
                if home[key] is slot.value:
                    keep(home, key, slot.inner)
            follow(slot.inner, slot.value)  # the pipeline may have moved in the meantime
        for thing, pipe in reversed(done.things):
            thing.take_off(pipe)
        self._done.pop(entry)


_TWO_LAYERS = (
    "{} brings a LoRA for layers that {} exchanges: neither could be taken off without the other; take one off, or fuse the LoRA into the "
    "pipeline's weights (pipe.fuse_lora) before the other is put on"
)


def _lies_free(slot: Slot) -> bool:
    """Whether nobody has put something over what a plugin has exchanged."""
    return slot.is_open or slot.home.get(slot.key) is slot.inner or slot.inner is None


def _fused(models: Iterable[nn.Module]) -> frozenset[Any]:
    """(LoRA layer, name) of each LoRA that is added to the weights below it, of the layers that are there."""
    layers = [module for model in models for module in model.modules() if hasattr(module, "merged_adapters")]
    return frozenset((ref(layer), name) for layer in layers for name in layer.merged_adapters)  # type: ignore[union-attr]


def _loras_in(part: nn.Module | nn.Parameter | None) -> set[Any]:
    """Names of the LoRA that lie somewhere in a module."""
    inside = part.modules() if isinstance(part, nn.Module) else ()
    return {name for module in inside if hasattr(module, "merged_adapters") for name in getattr(module, "scaling", ())}


def _hides_weights(slot: Slot) -> bool:
    """Whether what is written to the weights of what a plugin has put in does not reach those of what was there."""
    hidden, shown = ({*part.parameters()} if isinstance(part, nn.Module) else {part} for part in (slot.inner, slot.value))
    return bool(hidden - shown - {None})


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
