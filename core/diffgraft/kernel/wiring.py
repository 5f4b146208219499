"""From the plugins of a stack to open slots: which objects of a pipeline are wrapped, and where each wrapper leads.

Slots are open only while a run is in progress. They are kept from run to run and their wrappers with them, because ``torch.compile``
guards on the identity of what it finds in ``forward``; only where they lead is set anew.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from diffgraft.installed.anatomy import AttentionInfo, attention_of, blocks_of, controls_of, denoisers_of, root_of
from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import AttentionCall, BlockCall
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.onion import Chain, Onions, active_run, compose, stream_terminal
from diffgraft.kernel.run import Run
from diffgraft.kernel.slots import Slot, StandIn, method_slot, shown_on, wraps_method
from diffgraft.kernel.units import Replaced, in_place_of

Names = Mapping[str, int]
Lead = Callable[[Callable[..., Any], Names, tuple[Any, ...], dict[str, Any]], Any]


class Wiring:
    """The slots of one pipeline's stack."""

    def __init__(self, pipe: Any, family: Family) -> None:
        self.pipe = pipe
        self.family = family
        self._kept: dict[tuple[int, str, int], Slot] = {}  # of the last run
        self._used: dict[tuple[int, str, int], Slot] = {}  # of the run that is being connected

    def connect(self, run: Run, entries: Sequence[Entry], loop: bool = True) -> list[Slot]:
        """The slots that a run of ``entries`` needs, led to ``run``; nothing is open yet. A point without a plugin gets none.

        ``loop``: whether the pipeline's loop runs, so that the scheduler is asked.
        """
        points = {point for entry in entries for point in entry.plugin.points()}
        onions = Onions(run, entries)
        self._used = {}
        slots = self._scheduler(run, onions, entries) if loop else []
        # a session counts; what a run is bound to is held against the first call; exchanged modules ask where they are (`now`)
        if points & {"denoise", "block", "attention", "guide", "modules"} or run.bound or not loop:
            slots += self._denoisers(run, onions)
            run.report.counting = True
        if "control" in points:
            networks = controls_of(self.pipe)
            lead = partial(run.control, onions.control)
            slots += [self._method(network, "forward", lead, takes=CONTROL) for network in networks]
            run.promise("control", bool(networks))
        denoisers = denoisers_of(self.pipe, self.family)
        if "block" in points:
            chosen = _select(run, entries, "block", blocks_of(self.family, denoisers), denoisers)
            lead = partial(run.inside, "block", BlockCall)
            for info, chain, graph in chosen:
                slots.append(self._method(info.module, "forward", partial(lead, chain, info), True, info.takes, graph))
            run.promise("block", bool(chosen))
        if "attention" in points:
            layers = _select(run, entries, "attention", attention_of(denoisers), denoisers)
            lead = partial(run.inside, "attention", AttentionCall)
            slots += [self._processor(info, partial(lead, chain, info), graph) for info, chain, graph in layers]
            run.promise("attention", bool(layers))
        self._kept, self._used = self._used, {}  # a scheduler or denoiser that was replaced is not held on to
        return slots

    def _scheduler(self, run: Run, onions: Onions, entries: Sequence[Entry]) -> list[Slot]:
        slots: list[Slot] = []
        own = scheduler = self.pipe.scheduler
        for entry in entries:
            if (new := entry.plugin.make_scheduler(scheduler, self.family)) is not None:
                scheduler = in_place_of(own, new)
                run.replaced = Replaced(own, scheduler, entry.name)
                slots.append(shown_on(self.pipe, "scheduler", scheduler))
                run.report_of(entry).fired["scheduler"] = 1
        slots.append(self._method(scheduler, "set_timesteps", partial(run.set_timesteps, onions.schedule), takes=SET_TIMESTEPS))
        stepping = self._method(scheduler, "step", partial(run.scheduler_step, onions), takes=STEP)
        stepping.copied = partial(self._copy, run, onions, slots)
        slots.append(stepping)
        if any(entry.plugin.effects.asks_at_latents for entry in entries) and hasattr(scheduler, "scale_model_input"):
            slots.append(self._method(scheduler, "scale_model_input", run.note_scaling))
        for slot in slots:
            if slot is not stepping and slot.home is scheduler.__dict__:
                slot.copied = partial(_plainly, run, slots, slot.key)
        if scheduler is not self.pipe.scheduler:  # made for this run: it goes with it
            self._used = {key: slot for key, slot in self._used.items() if key[0] != id(scheduler)}
        return slots

    def _copy(self, run: Run, onions: Onions, slots: list[Slot], scheduler: Any) -> Any:
        """What a deep copy of the run's scheduler shows as its ``step``: its own, seen by the run. None where it is not the pipeline that
        copies (a user's callback does)."""
        if active_run() is not run:
            return None
        if not run.report.counting:  # which steps belong together is seen by the denoiser call between them
            run.report.counting = True
            for each in self._denoisers(run, onions):
                slots.append(each)
                each.open()
        slot = method_slot(scheduler, "step")
        names = positions(scheduler, "step", STEP)
        slot.put(wraps_method(scheduler, "step", self._wrapper(slot, names, inside=False)))
        slot.lead = partial(run.copied_step, onions, run.new_copy(scheduler))
        slots.append(slot)  # closed with the run's others
        slot.open()
        return slot.value

    def _denoisers(self, run: Run, onions: Onions) -> list[Slot]:
        slots = []
        family = self.family
        takes = (family.sample, family.timestep, "encoder_hidden_states") if family.kind == "unet" else (family.sample,)
        for name, module in denoisers_of(self.pipe, self.family).items():
            slots.append(self._method(module, "forward", partial(run.denoise, onions, name), takes=takes))
            if (family.guidance.layout == "sequential" or family.guidance.extra) and hasattr(module, "cache_context"):
                slots.append(self._method(module, "cache_context", partial(_named_context, run)))
        return slots

    def _method(self, target: Any, name: str, lead: Lead, inside: bool = False, takes: Sequence[str] = (), graph: Any = None) -> Slot:
        """A slot on a method.

        ``inside``: fires only within a denoiser call (a ControlNet may share the module); ``takes``: the order of its first arguments
        where no signature says it; ``graph``: the compiled one that it breaks up.
        """
        eager: Any = root_of(target)  # a compiled module's own forward is (*args, **kwargs)
        # a module that was compiled in place is called there: a wrapper on its `forward` would be inside its graph
        place = "_compiled_call_impl" if name == "forward" and target.__dict__.get("_compiled_call_impl") is not None else name
        slot = self._kept.get((id(target), place, id(graph)))
        if slot is None or slot.home is not target.__dict__:
            slot = method_slot(target, place)
            slot.put(wraps_method(eager, name, self._wrapper(slot, positions(eager, name, takes), inside, graph)))
        self._used[id(target), place, id(graph)] = slot
        slot.lead = lead
        return slot

    def _wrapper(self, slot: Slot, names: Names, inside: bool, graph: Any = None) -> Callable[..., Any]:
        again = None if graph is None else compiled_in(graph)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            run = active_run()
            # a gradient pass takes the eager form: the graphs of a pipeline have no backward
            inner = slot.inner if again is None or torch.is_grad_enabled() else again(slot.inner)
            if run is None or run.pipe is not self.pipe or slot.lead is None or (inside and run.branch is None):
                return inner(*args, **kwargs)  # another pipeline that shares this module, or one who kept our wrapper
            return slot.lead(inner, names, args, kwargs)

        # in a graph nothing of ours is to be compiled, and what was there is compiled by itself; elsewhere this costs nothing
        return torch.compiler.disable(wrapper, recursive=graph is not None)  # type: ignore[no-any-return]

    def _processor(self, info: AttentionInfo, lead: Lead, graph: Any) -> Slot:
        module = info.module
        processor: Any = module.processor
        slot = self._kept.get((id(module), "processor", id(graph)))
        if slot is None or slot.home is not module.__dict__ or not slot.value.stands_for(processor):
            slot = Slot(module.__dict__, "processor", lambda: module.processor)
            wrapper = self._wrapper(slot, positions(processor, "__call__", PROCESSOR), True, graph)
            stand_in = proxy_class(type(processor))  # type: ignore[arg-type]  # a class is hashable
            slot.put(stand_in(processor, wrapper))
        self._used[id(module), "processor", id(graph)] = slot
        slot.lead = lead
        return slot


def _select(
    run: Run, entries: Sequence[Entry], point: str, infos: Sequence[Any], denoisers: Mapping[str, nn.Module]
) -> list[tuple[Any, Chain, Any]]:
    """(info, onion, graph that it breaks up) for each block or layer that at least one plugin selects."""
    wanted: dict[int, list[Entry]] = {}
    for entry in entries:
        if point in entry.plugin.points():
            select = entry.plugin.select_blocks if point == "block" else entry.plugin.select_attention
            for info in select(infos):
                wanted.setdefault(info.order, []).append(entry)
    chosen = []
    for info in infos:
        if its := wanted.get(info.order):
            graph = graph_around(denoisers[info.model], info.path, its[0].name, point)
            chosen.append((info, compose(run, its, point, stream_terminal), graph))
    return chosen


def graph_around(denoiser: nn.Module, path: str, name: str, point: str) -> Any:
    """The context of torch.compile whose graph a hook at ``path`` breaks up: that of the innermost compiled module around it, or None.

    Raises:
        Unsupported: a module around it was compiled with fullgraph=True, so that the hook would end in an error of dynamo's.
    """
    module = root_of(denoiser)
    around = [denoiser, module]
    parts = path.split(".")
    for part in parts if point == "attention" else parts[:-1]:  # a processor runs inside its layer, a block is wrapped from outside
        module = module._modules[part]
        around.append(module)
    contexts = [context for module in around if (context := context_of(module)) is not None]
    if any(getattr(context, "fullgraph", False) for context in contexts):
        raise Unsupported(
            f"{name} needs its {point} hooks inside the denoiser, but {path} was compiled by torch.compile(fullgraph=True), alone or as a "
            "part, which allows no break in its graph; compile it without fullgraph"
        )
    return contexts[-1] if contexts else None


def context_of(module: nn.Module) -> Any:
    """The context that compiled a module, as a whole (``torch.compile(module)``) or in place (``module.compile()``), or None."""
    if (context := module.__dict__.get("dynamo_ctx")) is not None:
        return context
    function = module.__dict__.get("_compiled_call_impl")
    code = getattr(function, "__code__", None)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True)) if code is not None else {}
    return cells["self"].cell_contents if "self" in cells else None  # torch gives no other way to what compiled a function


def compiled_in(graph: Any) -> Callable[[Any], Callable[..., Any]]:
    """Compiles what a wrapper found as the graph around it was compiled; once for each thing found."""
    known: list[Any] = [None, None]

    def again(inner: Any) -> Callable[..., Any]:
        if known[0] is not inner:
            known[:] = inner, graph(inner if inspect.ismethod(inner) else inner.__call__)
        return known[1]  # type: ignore[no-any-return]

    return again


def _plainly(run: Run, slots: list[Slot], name: str, scheduler: Any) -> Any:
    """What a deep copy of the run's scheduler shows as its other methods: its own, by a slot, so that they are taken out again."""
    if active_run() is not run:
        return None
    slot = method_slot(scheduler, name)
    slot.put(wraps_method(scheduler, name, lambda *args, **kwargs: slot.inner(*args, **kwargs)))
    slots.append(slot)
    slot.open()
    return slot.value


@contextmanager
def _named_context(run: Run, inner: Callable[..., Any], names: Names, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """``model.cache_context("cond")``: the pipeline itself names the branch."""
    run.context = args[0] if args else kwargs["name"]
    try:
        with inner(*args, **kwargs) as entered:
            yield entered
    finally:
        run.context = None


class ProcessorProxy(StandIn):
    """Stands in for an attention processor during a run."""

    def __init__(self, processor: Any, wrapper: Callable[..., Any]) -> None:
        super().__init__(processor)
        self.__dict__["_wrapper"] = wrapper

    def stands_for(self, processor: Any) -> bool:
        """Whether it was made for this very processor."""
        return self.__dict__["_thing"] is processor


@functools.cache
def proxy_class(processor: Any) -> type[ProcessorProxy]:
    """The stand-ins of one class of processors.

    ``Attention.forward`` reads the signature of ``processor.__call__`` at every call, to decide which arguments it may pass; a compiled
    one is compiled again for every other function that it finds there, so it belongs to the class.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        return self._wrapper(*args, **kwargs)

    __call__.__defaults__ = ()  # dynamo guards on their number, and None has none
    __call__.__signature__ = inspect.signature(processor.__call__)  # type: ignore[attr-defined]
    return type("ProcessorProxy", (ProcessorProxy,), {"__call__": __call__})


STEP = ("model_output", "timestep", "sample")
SET_TIMESTEPS = ("num_inference_steps", "device")
CONTROL = ("sample", "timestep", "encoder_hidden_states", "controlnet_cond")
PROCESSOR = ("attn", "hidden_states", "encoder_hidden_states", "attention_mask")
"""The order in which pipelines and layers pass these, for methods whose signature does not say it."""


def positions(target: Any, name: str, takes: Sequence[str] = ()) -> dict[str, int]:
    """Parameter name -> position, of the positional parameters of ``target.name``.

    Where somebody's wrapper has hidden them behind ``*args`` (a mock, a tracer, a decorator without ``functools.wraps``), they are read
    from the class, then from its bases, and what none of these says is ``takes``, the convention.
    """
    defined = [vars(cls)[name] for cls in type(target).__mro__ if name in vars(cls)]
    for function in (getattr(target, name), *defined):
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # a callable that tells no signature
            continue
        found = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if function in defined:
            found = found[1:]  # self
        hidden = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if found or not hidden:
            return {parameter: i for i, parameter in enumerate((*found, *(takes[len(found) :] if hidden else ())))}
    return {parameter: i for i, parameter in enumerate(takes)}
