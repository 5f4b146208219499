"""``pipe.plugins``, the plugins on one pipeline: attached, run, taken off without trace. Slots are open only while a run is in progress."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from diffgraft.installed.anatomy import Target, denoisers_of
from diffgraft.installed.errors import ConfigError, Conflict, DiffgraftError, PluginNotFound, choices
from diffgraft.installed.family import Family
from diffgraft.installed.planner import Part, Plan, plan
from diffgraft.installed.plugin import Plugin
from diffgraft.installed.specs import names_of
from diffgraft.kernel.beside import foreign_parts
from diffgraft.kernel.calls import RunCall
from diffgraft.kernel.claim import Claim, clean_in_children
from diffgraft.kernel.defaults import filled
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.facts import RunBound
from diffgraft.kernel.given import describe, ensure_family, fetch
from diffgraft.kernel.grafted import STACK, class_with
from diffgraft.kernel.modular import arguments_of, call_plain, family_of, signature_of
from diffgraft.kernel.onion import call_inner, compose, leave, outside, running
from diffgraft.kernel.run import Run
from diffgraft.kernel.seen import follow_device, follow_dtypes, seconds_in, see
from diffgraft.kernel.session import Session, SessionRun, begin, ensure_no_loop
from diffgraft.kernel.slots import Slot, close_all, free_the_gate, set_class, shown_on, surely
from diffgraft.kernel.surgery import Surgery
from diffgraft.kernel.verdict import ensure_fired, warn_of_idle
from diffgraft.kernel.wiring import Wiring
from diffgraft.stacks.asked import Plugins, build_for
from diffgraft.stacks.report import Report
from diffgraft.stacks.shown import stack_html
from diffgraft.stacks.writing import write_stack

_log = logging.getLogger(__name__)
SECOND = "Make a second one with copy.deepcopy(pipe)"


def stack_of(pipe: Any) -> PluginStack | None:
    """The plugin stack of a pipeline, or None when nothing was ever attached (or all was taken off)."""
    return getattr(type(pipe), STACK, None)


def ensure_bare(pipe: Any, why: str) -> None:
    """Raises Conflict when there are plugins on the pipeline."""
    stack = stack_of(pipe)
    if stack is not None and (names := stack.list()):
        raise Conflict(f"{', '.join(names)} on this pipeline; diffgraft.unload(pipe) first: {why}")


def attach(pipe: Any, plugins: Sequence[Plugin], disabled: Collection[str] = ()) -> PluginStack:
    """Put ``plugins`` on ``pipe``, inside those that are there. All checks come first: if one fails, the pipeline is as it was.

    Args:
        disabled: names of those that are switched off from the beginning.

    Raises:
        Conflict: a plugin is there already, or two do not fit together.
        Unsupported: the family or this pipeline cannot take one of them.
    """
    stack = stack_of(pipe)
    if stack is not None:
        stack.put(plugins, disabled)
        return stack
    stack = PluginStack(pipe, family_of(pipe))
    set_class(pipe, class_with(stack))  # first: whatever interrupts what follows, `unload` finds what there is to take off
    try:
        stack.put(plugins, disabled)
    except BaseException:
        surely(stack.clear)
        raise
    return stack


class PluginStack:
    """``pipe.plugins``."""

    def __init__(self, pipe: Any, family: Family) -> None:
        self.pipe = pipe
        self.family = family
        self.base_class: type = type(pipe)
        self._entries: tuple[Entry, ...] = ()
        self._wiring = Wiring(pipe, family)
        self.surgery = Surgery()
        self._undo: tuple[Callable[[], None], ...] = ()
        self._busy = Claim()
        self._open: tuple[Run, Sequence[Slot]] | None = None
        """The run in progress and its slots; of an interrupted one until they are closed."""
        self._last = Report()
        self._warned: set[Entry] = set()
        self.check_finite = False
        """Whether runs end in ``NotFinite``, which names who made the first value that is not finite: to find a fault; each hook waits."""
        clean_in_children(self)

    # what users call --------------------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(entry.name for entry in self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return any(entry.name == getattr(name, "name", name) for entry in self._entries)

    def __getitem__(self, name: Any) -> Plugin:
        return self._entry(name).plugin

    def __repr__(self) -> str:
        parts = [entry.name + ("" if entry.enabled else " (disabled)") for entry in self._entries]
        return f"<plugins of {self.base_class.__name__}: {', '.join(parts) or 'none'}>"

    def _repr_html_(self) -> str:
        return stack_html(self.base_class.__name__, [(entry.plugin, entry.enabled) for entry in self._entries])

    def list(self) -> tuple[str, ...]:
        """Names, outermost first."""
        return tuple(self)

    def report(self) -> Report:
        """What each plugin did in the last run; printed, it says so when there was none, or when none was active in it."""
        return self._last

    @property
    def plan(self) -> Plan:
        """The planner's verdict on the enabled plugins; its warnings are worth reading."""
        return self._plan_of([entry.plugin for entry in self._enabled()])

    def run_scheduler(self) -> Any:
        """The scheduler that a run has: the pipeline's own, or what an enabled plugin replaces it with."""
        scheduler = self.own_scheduler()
        for entry in self._enabled():
            scheduler = entry.plugin.make_scheduler(scheduler, self.family) or scheduler
        return scheduler

    def own_scheduler(self) -> Any:
        """The pipeline's own scheduler, also in a run that has a plugin's in its place."""
        replaced = self._open[0].replaced if self._open else None
        return self.pipe.scheduler if replaced is None else replaced.own

    # Plugins are named by name, class or instance, singly or in lists.

    def enable(self, *names: Any) -> None:
        """Switch plugins on again (all, when none is named).

        Raises:
            Conflict: they do not fit together with those that are on; all stay as they were.
        """
        self._toggle(names, True)

    def disable(self, *names: Any) -> None:
        """Switch plugins off for the following runs (all, when none is named); they stay in the list."""
        self._toggle(names, False)

    @contextmanager
    def disabled(self, *names: Any) -> Iterator[None]:
        """``with pipe.plugins.disabled(): baseline = pipe(...)``"""
        before = [(entry, entry.enabled) for entry in self._entries]
        self.disable(*names)
        try:
            yield
        finally:
            self._turn({entry: enabled for entry, enabled in before if entry in self._entries})

    def configure(self, name: Any, /, **knobs: Any) -> None:
        """Change knobs between runs; the others stay.

        Raises:
            ConfigError: an unknown knob or a value out of range, or not one plugin; the old knobs stay.
            Conflict: at these knobs it does not fit together with the others; the old knobs stay.
        """
        self._refuse_in_run("configure a plugin of")
        entry = self._entry(name)
        new = type(entry.plugin)(**{**entry.plugin.own_knobs, **knobs})
        if entry.enabled:
            self._ensure_fit([new if each is entry else each.plugin for each in self._enabled()])
        same = [need.knob for need in new.needs if getattr(new.config, need.knob) == getattr(entry.plugin.config, need.knob)]
        given = self._fetch(new, describe(self.pipe, self.family), {knob: entry.given[knob] for knob in same})
        enabled, old = entry.enabled, (entry.plugin, entry.given)
        self._switch(entry, False)
        entry.plugin, entry.given = new, given
        try:
            self._switch(entry, enabled)
            self._see(entry)
        except BaseException:
            entry.plugin, entry.given = old
            self._switch(entry, enabled)
            raise

    def remove(self, *names: Any) -> None:
        """Take plugins off; none where one cannot be."""
        self._refuse_in_run("take plugins off")
        for entry in self.surgery.ensure_free([self._entry(name) for name in dict.fromkeys(names_of(names))]):
            self._switch(entry, False)
            self._entries = tuple(kept for kept in self._entries if kept is not entry)

    def clear(self) -> None:
        """Take all plugins off and give the pristine pipeline back: nothing of diffgraft stays on it, ``pipe.plugins`` included."""
        self.remove(*self)
        while self._undo:
            self._undo[-1]()
            self._undo = self._undo[:-1]
        if stack_of(self.pipe) is self:
            set_class(self.pipe, self.base_class)  # last: until then `unload` can be called again

    # attaching --------------------------------------------------------------------------------------------------------------------

    def add(self, *plugins: Plugins) -> None:
        """Check plugins against this pipeline and against those that are there, then put them innermost.

        Args:
            plugins: each in any form that ``load_pipeline(plugins=...)`` takes.
        """
        self.put(*build_for(self.pipe, self.family, plugins))

    def save(self, path: str | os.PathLike[str], *, measured: Mapping[str, Any] | None = None, copy_files: bool = False) -> Path:
        """Write the plugins, their knobs and which are off to a file for ``load_pipeline(plugins=path)``: see :func:`write_stack`."""
        plugins = [(entry.plugin, entry.enabled) for entry in self._entries]
        return write_stack(path, plugins, self.family.name, self.base_class.__name__, measured=measured, copy_files=copy_files)

    def put(self, new: Sequence[Plugin], disabled: Collection[str] = ()) -> None:
        """:meth:`add` of plugins that are built; ``disabled`` names those that are switched off from the beginning."""
        self._refuse_in_run("attach plugins to")
        for plugin in new:
            if plugin.name in self:
                raise Conflict(
                    f"{plugin.name} is on this pipeline already; pipe.plugins.configure({plugin.name!r}, ...) changes its knobs, "
                    f"pipe.plugins.remove({plugin.name!r}) takes it off"
                )
        self._ensure_fit([entry.plugin for entry in self._enabled()] + [plugin for plugin in new if plugin.name not in disabled])
        target = describe(self.pipe, self.family)
        given = [self._fetch(plugin, target, {}) for plugin in new]
        before = self._entries
        try:
            for plugin, things in zip(new, given, strict=True):
                entry = Entry(plugin, given=things)
                self._entries = (*self._entries, entry)
                self._switch(entry, plugin.name not in disabled)
                self._see(entry)
        except BaseException:
            for entry in self._entries[len(before) :]:
                self._switch(entry, False)
            self._entries = before
            raise
        for warning in self.plan.warnings:
            _log.warning(warning)
        for plugin in new:
            knobs = ", ".join(f"{knob}={value!r}" for knob, value in plugin.own_knobs.items())
            _log.info("%s(%s) attached to %s; outermost first: %s", plugin.name, knobs, self.base_class.__name__, ", ".join(self))

    def _fetch(self, plugin: Plugin, target: Target, known: Mapping[str, Any]) -> dict[str, Any]:
        """What the plugin needs, after it and the core have found nothing against this pipeline."""
        ensure_family(plugin, self.family, self.base_class)
        given = fetch(plugin, target, known)
        plugin.check(replace(target, given=given))
        return given

    def copy_to(self, pipe: Any) -> None:
        """Put the same plugins on a copy of this stack's pipeline, switched on and off as here."""
        plugins = [type(entry.plugin)(**entry.plugin.own_knobs) for entry in self._entries]
        attach(pipe, plugins, [entry.name for entry in self._entries if not entry.enabled])

    def _see(self, entry: Entry) -> None:
        bound = any(isinstance(value, RunBound) for value in entry.given.values())
        entry.seen = see(self.pipe, self.family, seconds_in(entry.given), bound)

    def _verify(self, entries: Sequence[Entry]) -> None:
        """At every run: make the checks of attaching again where what they rest on has changed since.

        Raises:
            ArtefactMismatch, Conflict, Unsupported: as when the plugins were put on.
        """
        for entry in entries:
            for second in seconds_in(entry.given):
                follow_device(second, self.pipe._execution_device)
            if not all(seen.holds() for seen in entry.seen):
                follow_dtypes(seconds_in(entry.given), self.pipe, self.family)
                entry.given = self._fetch(entry.plugin, describe(self.pipe, self.family), entry.given)
                self._see(entry)
        self.plan.ensure()

    def on_clear(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called by :meth:`clear`."""
        self._undo = (*self._undo, undo)

    def _entry(self, plugin: Any) -> Entry:
        name, *more = names_of([plugin]) or [""]
        if more:
            raise ConfigError(f"{plugin!r} names {1 + len(more)} plugins; give one")
        for entry in self._entries:
            if entry.name == name:
                return entry
        raise PluginNotFound(f"{name!r} is not on this pipeline{choices(name, self, 'On it')}")

    def _enabled(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._entries if entry.enabled)

    def _toggle(self, names: Sequence[Any], enabled: bool) -> None:
        self._refuse_in_run("enable or disable plugins of")
        self._turn({self._entry(name): enabled for name in (names_of(names) if names else self)})

    def _turn(self, wanted: Mapping[Entry, bool]) -> None:
        """Switch entries on and off; none where those that would then be on do not fit together."""
        self._ensure_fit([entry.plugin for entry in self._entries if wanted.get(entry, entry.enabled)])
        self.surgery.ensure_free([entry for entry, enabled in wanted.items() if not enabled])
        for entry, enabled in wanted.items():
            self._switch(entry, enabled)

    def _plan_of(self, plugins: Sequence[Plugin]) -> Plan:
        return plan([Part.of(plugin) for plugin in plugins], foreign_parts(denoisers_of(self.pipe, self.family)))

    def _ensure_fit(self, plugins: Sequence[Plugin]) -> None:
        """Raises Conflict where these, switched on, bring a conflict that is not there now."""
        self._plan_of(plugins).ensure(known=self.plan.conflicts)

    def _refuse_in_run(self, what: str) -> None:
        if self._busy.locked():
            raise DiffgraftError(f"cannot {what} this pipeline while it is running; do it before or after the call")
        self.settle()

    def settle(self) -> None:
        """At every entry, and in a forked child: finish what an interrupt, or the fork, has kept a call from finishing."""
        if not self._busy.locked():
            free_the_gate()
            self._finish()

    def _finish(self) -> None:
        """Close what a run has opened and free what it held; nothing where that is done."""
        if self._open is not None:
            run, slots = self._open
            close_all(slots)
            run.end()
            leave(run)
            self._open = None

    def _switch(self, entry: Entry, enabled: bool) -> None:
        """Turn an entry on or off; the modules that it exchanges go in and out with it."""
        if enabled:
            self.surgery.operate(entry, self.pipe, self.family)
        else:
            self.surgery.undo(entry)
        entry.enabled = enabled

    # running ----------------------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One ``pipe(...)`` call."""
        function = partial(call_plain, self.base_class)
        self.settle()
        entries = self._enabled()
        if not entries:
            self._last = report = Report(disabled=self.list())
            started = time.perf_counter()
            try:
                with running(None):  # called from inside another pipeline's run, it is no part of that
                    result = function(self.pipe, *args, **kwargs)
                report.completed = True
                return result
            finally:
                report.seconds = time.perf_counter() - started
        if not self._busy.take():
            raise DiffgraftError(
                f"this pipeline is running already (another thread, or a call from inside its own run), and it has one scheduler. {SECOND}"
            )
        try:
            return self._run(function, entries, args, kwargs)
        finally:
            self._busy.release()

    def _run(self, function: Callable[..., Any], entries: Sequence[Entry], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        started = time.perf_counter()
        signature = signature_of(self.pipe)
        run = Run(self.pipe, self.family, entries, self.check_finite)

        def one_pass(call: RunCall) -> Any:
            run.begin_pass(arguments_of(self.pipe, signature, call))
            for slot in slots:  # an earlier pass may have ended in an offload hook that threw ours away
                slot.open()
            result = call_inner(outside(call))
            run.end_pass(result)
            return result

        try:
            self._verify(entries)
            slots = self._wiring.connect(run, entries)
            self._open = run, slots  # before any is open
            with running(run):
                positions = {name: i for i, name in enumerate([*signature.parameters][1:])}
                whole = filled(self.pipe, args, kwargs)
                call = RunCall(run, lambda *a, **k: function(self.pipe, *a, **k), positions, args, whole)
                call.said = frozenset([*positions][: len(args)]) | kwargs.keys()
                result = compose(run, [entry for entry in entries if "run" in entry.plugin.points()], "run", one_pass)(call)
            ensure_fired(run, result)
            warn_of_idle(run, self._warned)
            run.report.completed = True
            return result
        finally:
            surely(self._finish)
            run.report.seconds = time.perf_counter() - started
            run.report.disabled = tuple(entry.name for entry in self._entries if entry not in entries)
            self._last = run.report
            run.report.log()

    def session(self, arguments: Mapping[str, Any] | None = None, *, scheduler: Any = None, generator: Any = None) -> Session:
        """The denoiser with the enabled plugins' hooks, without the pipeline's loop, for a ``with``; see :class:`Session`.

        Args:
            arguments: those of a call that plugins may look at (``guidance_scale``, ``prompt``).
            scheduler: where steps are counted: one whose timesteps are set. By default the pipeline's own, as it is.
            generator: what plugins draw noise from.

        Raises:
            DiffgraftError: entered while the pipeline is running.
            ArtefactMismatch, Conflict, Unsupported: as at the beginning of a run; or a plugin needs the loop (``Plugin.sessions``).
        """

        def enter(session: Session) -> SessionRun:
            self._refuse_in_run("open a session on")
            ensure_no_loop(self._enabled())
            if not self._busy.take(session):
                raise DiffgraftError(f"another thread has just begun to run this pipeline. {SECOND}")
            try:
                entries = self._enabled()
                self._verify(entries)
                run = begin(self.pipe, self.family, entries, {**(arguments or {}), "generator": generator}, self.check_finite)
                slots = self._wiring.connect(run, entries, loop=False)
                if scheduler is not None:
                    slots.insert(0, shown_on(self.pipe, "scheduler", copy.copy(scheduler)))  # what a slot shows is marked
                self._open = run, slots
                for slot in slots:
                    slot.open()
            except BaseException:
                end()
                raise
            return run

        def end() -> None:
            surely(self._finish)
            self._busy.release()

        return Session(enter, end)
