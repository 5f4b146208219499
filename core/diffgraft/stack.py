"""The plugins on one pipeline: attached, verified, run, taken off without trace.

The pipeline object gets a class of its own (same name, a subclass of its class) that carries ``__call__`` and ``plugins``. All other slots are open
only while a run is in progress: between runs the denoiser, its blocks, its processors and the scheduler are exactly the user's. That is why
offloading before or after, a new scheduler, LoRA, ``from_pipe``, saving and pickling need no special care.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffgraft.calls import AttentionInfo, BlockInfo, ModulesCall, RunCall, Target
from diffgraft.errors import Conflict, DiffgraftError, PluginNotFound, Unsupported, nearest
from diffgraft.family import Family
from diffgraft.planner import Part, Plan, plan
from diffgraft.plugin import Entry, Plugin
from diffgraft.registry import find_family
from diffgraft.report import Report
from diffgraft.run import Run, Wiring, active_run, call_inner, compose, running
from diffgraft.slots import Slot, method_slot, set_class, wraps_method

_STACK = "_diffgraft_stack"

Lead = Callable[[Slot, Mapping[str, int], tuple[Any, ...], dict[str, Any]], Any]


def stack_of(pipe: Any) -> PluginStack | None:
    """The plugin stack of a pipeline, or None when nothing was ever attached (or all was taken off)."""
    return getattr(type(pipe), _STACK, None)


def attach(pipe: Any, plugins: Sequence[Plugin]) -> PluginStack:
    """Put ``plugins`` on ``pipe`` (beside those that are there). All checks come first: if one fails, the pipeline is as it was.

    Raises:
        Conflict: a plugin is there already, or two do not fit together.
        Unsupported: the family or this pipeline cannot take one of them.
    """
    stack = stack_of(pipe)
    if stack is None:
        stack = PluginStack(pipe, find_family(type(pipe)))
    stack._add(plugins)
    stack._install_class()
    return stack


class PluginStack:
    """``pipe.plugins``."""

    def __init__(self, pipe: Any, family: Family) -> None:
        self.pipe = pipe
        self.family = family
        self.base_class: type = type(pipe)
        self._entries: list[Entry] = []
        self._last: Report | None = None
        self._busy = threading.Lock()
        self._undo: list[Callable[[], None]] = []
        self._swaps: dict[Entry, list[Slot]] = {}
        self._slots: dict[tuple[int, str], Slot] = {}

    # what users call --------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        return iter([entry.name for entry in self._entries])

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in list(self)

    def __getitem__(self, name: str) -> Plugin:
        return self._entry(name).plugin

    def __repr__(self) -> str:
        parts = [entry.name + ("" if entry.enabled else " (disabled)") for entry in self._entries]
        return f"<plugins of {self.base_class.__name__}: {', '.join(parts) or 'none'}>"

    def list(self) -> tuple[str, ...]:
        """Names, outermost first."""
        return tuple(self)

    def report(self) -> Report:
        """What each plugin did in the last run."""
        return self._last if self._last is not None else Report()

    @property
    def plan(self) -> Plan:
        """The planner's verdict on the enabled plugins (its warnings are worth reading)."""
        return plan([Part(entry.name, entry.plugin.effects) for entry in self._active()])

    def enable(self, *names: str) -> None:
        """Switch plugins on again (all, when none is named)."""
        self._toggle(names, True)

    def disable(self, *names: str) -> None:
        """Switch plugins off for the following runs (all, when none is named); they stay in the list."""
        self._toggle(names, False)

    @contextmanager
    def disabled(self, *names: str) -> Iterator[None]:
        """``with pipe.plugins.disabled(): baseline = pipe(...)``"""
        before = [(entry, entry.enabled) for entry in self._entries]
        self.disable(*names)
        try:
            yield
        finally:
            for entry, enabled in before:
                if entry in self._entries:
                    self._switch(entry, enabled)

    def configure(self, name: str, **knobs: Any) -> None:
        """Change knobs between runs; the others stay.

        Raises:
            ConfigError: an unknown knob or a value out of range; the old knobs stay.
        """
        self._refuse_in_run("configure")
        entry = self._entry(name)
        new = type(entry.plugin)(**{**entry.plugin.config.model_dump(exclude_unset=True), **knobs})
        new.check(self._target())
        self._switch(entry, False, keep=True)
        entry.plugin = new
        self._switch(entry, entry.enabled)

    def remove(self, *names: str) -> None:
        """Take plugins off."""
        self._refuse_in_run("remove")
        for entry in [self._entry(name) for name in names]:
            self._switch(entry, False)
            self._entries.remove(entry)

    def clear(self) -> None:
        """Take all plugins off and give the pristine pipeline back: nothing of diffgraft stays on it, ``plugins`` included."""
        self.remove(*self.list())
        if stack_of(self.pipe) is self:
            set_class(self.pipe, self.base_class)
        while self._undo:
            self._undo.pop()()

    def denoisers(self) -> dict[str, nn.Module]:
        """The denoisers of this pipeline by attribute name."""
        found = {name: getattr(self.pipe, name, None) for name in self.family.denoisers}
        return {name: module for name, module in found.items() if module is not None}

    def on_clear(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called by :meth:`clear`."""
        self._undo.append(undo)

    # attaching --------------------------------------------------------------------------------------------------------------------

    def _add(self, plugins: Sequence[Plugin]) -> None:
        self._refuse_in_run("attach to")
        for plugin in plugins:
            if plugin.name in self:
                raise Conflict(
                    f"{plugin.name} is on this pipeline already; pipe.plugins.configure({plugin.name!r}, ...) changes its knobs, "
                    f"pipe.plugins.remove({plugin.name!r}) takes it off"
                )
        everything = [entry.plugin for entry in self._entries] + list(plugins)
        plan([Part(p.name, p.effects) for p in everything]).ensure()
        target = self._target()
        for plugin in plugins:
            if "*" not in plugin.families and not {self.family.name, self.family.kind} & set(plugin.families):
                raise Unsupported(
                    f"{plugin.name} does not work on {self.base_class.__name__} (family {self.family.name!r}, {self.family.kind}): "
                    f"it is made for {', '.join(plugin.families)}"
                )
            if "guide" in plugin.points() and self.family.guidance.layout == "none":
                raise Unsupported(f"{plugin.name} changes guidance, but {self.base_class.__name__} has none")
            plugin.check(target)
        entries = [Entry(plugin) for plugin in plugins]
        done: list[Entry] = []
        try:
            for entry in entries:
                self._entries.append(entry)
                done.append(entry)
                self._switch(entry, True)
        except BaseException:
            for entry in done:
                self._switch(entry, False)
                self._entries.remove(entry)
            raise

    def _install_class(self) -> None:
        if stack_of(self.pipe) is self:
            return
        base, stack = self.base_class, self

        def __call__(pipe: Any, *args: Any, **kwargs: Any) -> Any:
            return stack._call(args, kwargs)

        def __deepcopy__(pipe: Any, memo: dict[int, Any]) -> Any:
            new = copy.deepcopy(_Pristine(pipe, base), memo)
            memo[id(pipe)] = new
            attach(new, [type(entry.plugin)(**entry.plugin.config.model_dump(exclude_unset=True)) for entry in stack._entries])
            for entry, old in zip(stack_of(new)._entries, stack._entries, strict=True):  # type: ignore[union-attr]
                stack_of(new)._switch(entry, old.enabled)  # type: ignore[union-attr]
            return new

        def __reduce_ex__(pipe: Any, protocol: Any) -> Any:
            # a pickle holds the plain pipeline: which plugins the reader has installed is not ours to say
            function, arguments, *rest = object.__reduce_ex__(pipe, max(int(protocol), 2))
            return (function, (base, *arguments[1:]), *rest)

        body = {
            "__call__": wraps_method(base, "__call__", __call__),
            "__deepcopy__": __deepcopy__,
            "__reduce_ex__": __reduce_ex__,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "plugins": property(lambda pipe: stack, doc="The plugins on this pipeline."),
            _STACK: stack,
        }
        set_class(self.pipe, type(base.__name__, (base,), body))

    def _target(self) -> Target:
        denoisers = self.denoisers()
        return Target(self.pipe, self.family, denoisers, tuple(self._blocks(denoisers)))

    def _blocks(self, denoisers: Mapping[str, nn.Module]) -> Iterator[BlockInfo]:
        order = 0
        for model, denoiser in denoisers.items():
            root = getattr(denoiser, "_orig_mod", denoiser)  # under torch.compile
            for group in self.family.blocks:
                found = getattr(root, group.path, None)
                if found is None:  # a U-Net without a mid block, an optional list
                    continue
                single = not isinstance(found, nn.ModuleList)
                for index, block in enumerate([found] if single else found):
                    path = group.path if single else f"{group.path}.{index}"
                    yield BlockInfo(path, group.kind, index, -1, order, group.takes, group.returns, model, block)
                    order += 1
                    for layers in group.layers:
                        for number, layer in enumerate(getattr(block, layers, None) or []):
                            if layer is not None:
                                kind = f"{group.kind}.{layers.removesuffix('s')}"
                                yield BlockInfo(f"{path}.{layers}.{number}", kind, index, number, order, (), (), model, layer)
                                order += 1

    def _attention(self, denoisers: Mapping[str, nn.Module]) -> Iterator[AttentionInfo]:
        order = 0
        for model, denoiser in denoisers.items():
            root = getattr(denoiser, "_orig_mod", denoiser)
            for path, module in root.named_modules():
                if callable(getattr(module, "processor", None)):
                    cross = getattr(module, "is_cross_attention", None)
                    if cross is None:
                        cross = path.endswith("attn2")
                    yield AttentionInfo(path, order, bool(cross), model, module)
                    order += 1

    # switching --------------------------------------------------------------------------------------------------------------------

    def _entry(self, name: str) -> Entry:
        for entry in self._entries:
            if entry.name == name:
                return entry
        raise PluginNotFound(f"{name!r} is not on this pipeline{nearest(name, self)} On it: {', '.join(self) or 'nothing'}")

    def _active(self) -> list[Entry]:
        return [entry for entry in self._entries if entry.enabled]

    def _toggle(self, names: tuple[str, ...], enabled: bool) -> None:
        self._refuse_in_run("enable or disable plugins of")
        for entry in [self._entry(name) for name in names or self.list()]:
            self._switch(entry, enabled)

    def _switch(self, entry: Entry, enabled: bool, keep: bool = False) -> None:
        """Turn an entry on or off; module surgery goes in and out with it. ``keep``: leave the ``enabled`` mark alone."""
        if enabled and "modules" in entry.plugin.points() and entry not in self._swaps:
            self._swaps[entry] = []
            try:
                call = ModulesCall(None, None, {}, (), {})  # type: ignore[arg-type]
                call.entry, call.denoisers = entry, self.denoisers()
                call.swap = lambda parent, name, new: self._swap(self._swaps[entry], parent, name, new)
                entry.plugin.modules(call, lambda call: None)  # type: ignore[attr-defined]
            except BaseException:
                self._unswap(entry)
                raise
        if not enabled:
            self._unswap(entry)
        if not keep:
            entry.enabled = enabled

    @staticmethod
    def _swap(slots: list[Slot], parent: nn.Module, name: str, new: nn.Module) -> None:
        if name not in parent._modules:
            raise KeyError(f"{type(parent).__name__} has no submodule {name!r}; it has {', '.join(parent._modules)}")
        slot = Slot(parent._modules, name, lambda: parent._modules[name])  # type: ignore[arg-type]
        slot.put(new)
        slot.open()
        slots.append(slot)

    def _unswap(self, entry: Entry) -> None:
        slots = self._swaps.get(entry, [])
        for slot in slots:
            if not slot.is_open:
                raise Conflict(
                    f"{entry.name} cannot be taken off: something (LoRA?) was put over the module {slot.key!r} that it had exchanged; "
                    "unload that first"
                )
        self._swaps.pop(entry, None)
        for slot in reversed(slots):
            device = next((p.device for p in slot.value.parameters()), None)
            original = slot.inner
            slot.close()
            if device is not None and isinstance(original, nn.Module):
                original.to(device)  # the pipeline may have moved in the meantime

    def _refuse_in_run(self, what: str) -> None:
        if self._busy.locked():
            raise DiffgraftError(f"cannot {what} this pipeline while it is running; do it before or after the call")

    # running ----------------------------------------------------------------------------------------------------------------------

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entries = self._active()
        function = self.base_class.__call__
        if not entries:
            return function(self.pipe, *args, **kwargs)
        if not self._busy.acquire(blocking=False):
            raise DiffgraftError(
                "this pipeline is running already (another thread, or a call from inside its own run): it has one scheduler. "
                "Make a second pipeline with from_pipe or a deepcopy"
            )
        run = Run(self.pipe, self.family, entries)
        started = time.perf_counter()
        slots: list[Slot] = []
        try:
            signature = inspect.signature(function)
            names = {name: i for i, name in enumerate(list(signature.parameters)[1:])}
            wiring = self._wire(run, entries, slots)

            def one_pass(call: RunCall) -> Any:
                bound = signature.bind_partial(self.pipe, *call.args, **call.kwargs)
                bound.apply_defaults()
                run.begin_pass(bound.arguments)
                for slot in slots:  # an earlier pass may have ended in an offload hook that threw ours away
                    slot.open()
                with running(run):
                    return call_inner(call)

            call = RunCall(run, lambda *a, **k: function(self.pipe, *a, **k), names, args, kwargs)
            wrapping = [entry for entry in entries if "run" in entry.plugin.points()]
            result = compose(wrapping, "run", one_pass)(call)
            run.ensure_fired(result)
            run.report.completed = True
            return result
        finally:
            for slot in reversed(slots):
                slot.close()
                slot.lead = None
            run.end()
            run.report.seconds = time.perf_counter() - started
            self._last = run.report
            self._busy.release()

    def _wire(self, run: Run, entries: Sequence[Entry], slots: list[Slot]) -> Wiring:
        """Compose the onions and make the slots that lead to them; nothing is open yet."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        wiring = Wiring(entries, Transformer2DModelOutput)
        points = {point for entry in entries for point in entry.plugin.points()}
        self._wire_scheduler(run, wiring, entries, slots)
        denoisers = self.denoisers()
        if points & {"denoise", "block", "attention", "guide"}:
            for name, module in denoisers.items():
                slots.append(self._method(module, "forward", lambda slot, names, a, k, name=name: run.denoise(wiring, name, slot.inner, names, a, k)))
                if self.family.guidance.layout == "sequential" and hasattr(module, "cache_context"):
                    slots.append(self._cache_context(run, module))
        promised = set()
        if "block" in points:
            chains = self._select(entries, "block", list(self._blocks(denoisers)))
            for info, chain in chains:
                slots.append(self._in_denoiser(run, info.module, "forward", run.block, chain, info))
            promised |= {"block"} if chains else set()
        if "attention" in points:
            chains = self._select(entries, "attention", list(self._attention(denoisers)))
            for info, chain in chains:
                slots.append(self._processor(run, info, chain))
            promised |= {"attention"} if chains else set()
        run.promised = frozenset(promised)
        return wiring

    def _wire_scheduler(self, run: Run, wiring: Wiring, entries: Sequence[Entry], slots: list[Slot]) -> None:
        scheduler = self.pipe.scheduler
        for entry in entries:
            if (cls := entry.plugin.scheduler) is not None:
                replacement = cls.from_config(scheduler.config, **entry.plugin.scheduler_options())
                slot = Slot(self.pipe.__dict__, "scheduler", lambda: self.pipe.__dict__["scheduler"])
                slot.put(replacement)
                slots.append(slot)
                scheduler = replacement
                fired = run.report_of(entry).fired
                fired["scheduler"] = fired.get("scheduler", 0) + 1
        slots.append(self._method(scheduler, "set_timesteps", lambda slot, names, a, k: run.set_timesteps(wiring.schedule, slot.inner, names, a, k)))
        slots.append(self._method(scheduler, "step", lambda slot, names, a, k: run.scheduler_step(wiring, slot.inner, names, a, k)))
        if any("latents" in entry.plugin.effects.edits for entry in entries) and hasattr(scheduler, "scale_model_input"):

            def scale(slot: Slot, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
                run.unscaled = kwargs["sample"] if "sample" in kwargs else args[0]
                run.scale_model_input = slot.inner
                return slot.inner(*args, **kwargs)

            slots.append(self._method(scheduler, "scale_model_input", scale))

    def _select(self, entries: Sequence[Entry], point: str, infos: list[Any]) -> list[tuple[Any, Callable[[Any], Any]]]:
        """(info, onion) for each block or layer that at least one plugin selects."""
        wanted: dict[int, list[Entry]] = {}
        for entry in entries:
            if point in entry.plugin.points():
                select = entry.plugin.select_blocks if point == "block" else entry.plugin.select_attention
                for info in select(infos):
                    wanted.setdefault(info.order, []).append(entry)
        return [(info, compose(wanted[info.order], point, call_inner)) for info in infos if info.order in wanted]

    # the wrappers -----------------------------------------------------------------------------------------------------------------

    def _method(self, target: Any, name: str, lead: Lead) -> Slot:
        """A slot on a method; in a run it leads to ``lead(slot, names, args, kwargs)``.

        Slots are kept from run to run: torch.compile guards on the identity of what it finds in ``forward``.
        """
        kept = self._slots.get((id(target), name))
        if kept is None or kept.home is not target.__dict__:
            kept = self._slots[id(target), name] = method_slot(target, name)
            kept.put(wraps_method(target, name, self._wrapper(kept, positions(getattr(target, name)))))
        kept.lead = lead
        return kept

    def _wrapper(self, slot: Slot, names: Mapping[str, int]) -> Callable[..., Any]:
        @torch.compiler.disable(recursive=False)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            run = active_run()
            if run is None or run.pipe is not self.pipe or slot.lead is None:
                return slot.inner(*args, **kwargs)  # another pipeline that shares this module, or somebody who kept our wrapper
            return slot.lead(slot, names, args, kwargs)

        return wrapper

    def _in_denoiser(self, run: Run, target: Any, name: str, handle: Callable[..., Any], chain: Any, info: Any) -> Slot:
        """A slot that fires only inside a denoiser call: a ControlNet may share the module."""

        def lead(slot: Slot, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
            if run.branch is None:
                return slot.inner(*args, **kwargs)
            return handle(chain, info, slot.inner, names, args, kwargs)

        return self._method(target, name, lead)

    def _processor(self, run: Run, info: AttentionInfo, chain: Any) -> Slot:
        module = info.module
        slot = Slot(module.__dict__, "processor", lambda: module.processor)
        slot.put(ProcessorProxy(self, run, info, chain, slot, module.processor))
        return slot

    def _cache_context(self, run: Run, module: Any) -> Slot:
        @contextmanager
        def named(slot: Slot, names: Mapping[str, int], args: Any, kwargs: Any) -> Iterator[Any]:
            run.context = args[0] if args else kwargs["name"]
            try:
                with slot.inner(*args, **kwargs) as entered:
                    yield entered
            finally:
                run.context = None

        return self._method(module, "cache_context", named)


class ProcessorProxy:
    """Stands in for an attention processor during a run; to ``isinstance`` and to attribute access it is the processor itself."""

    def __init__(self, stack: PluginStack, run: Run, info: AttentionInfo, chain: Any, slot: Slot, processor: Any) -> None:
        names = positions(processor.__call__)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if active_run() is not run or run.branch is None:
                return slot.inner(*args, **kwargs)
            return run.attention(chain, info, slot.inner, names, args, kwargs)

        self.__dict__["_diffgraft_processor"] = processor
        self.__dict__["_diffgraft_call"] = wrapper
        # Attention.forward reads the signature of `processor.__call__` to decide which arguments to pass
        self.__dict__["__call__"] = wraps_method(processor, "__call__", lambda *a, **k: wrapper(*a, **k))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._diffgraft_call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_diffgraft_processor"], name)

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return type(self.__dict__["_diffgraft_processor"])


def positions(function: Callable[..., Any]) -> dict[str, int]:
    """Parameter name -> position of a bound method's positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: i for i, p in enumerate(p for p in parameters if p.kind in kinds)}


class _Pristine:
    """Copies a pipeline as an object of its own class, without what diffgraft put on it."""

    def __init__(self, pipe: Any, base: type) -> None:
        self.pipe, self.base = pipe, base

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.base.__new__(self.base)
        memo[id(self.pipe)] = new
        new.__dict__.update(copy.deepcopy(self.pipe.__dict__, memo))
        return new
