"""The onion of a hook point: the plugins' methods around what was there before, and the middle of each onion.

Which run a wrapper serves is a fact of the thread (:func:`running`): a wrapper fires only for the innermost run of its thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffgraft.installed.errors import BrokenPlugin
from diffgraft.kernel.boundary import FORMS, ensure_call, ensure_finite_given, ensure_finite_result, late, place, remember, watched
from diffgraft.kernel.calls import (
    AttentionCall,
    BlockCall,
    Call,
    ControlCall,
    DenoiseCall,
    GuideCall,
    RunView,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
)
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.guidance import ensure_whole
from diffgraft.kernel.slots import StandIn, add_note
from diffgraft.kernel.speech import forwarded

Chain = Callable[[Any], Any]

_thread = threading.local()


def active_run() -> Any:
    """The innermost run of this thread: a wrapper fires only for the run that opened it."""
    return getattr(_thread, "run", None)


def leave(run: RunView) -> None:
    """Take back :func:`running` where an interrupt has kept it from doing so itself."""
    if active_run() is run:
        _thread.run = None


def compose(run: RunView, entries: Sequence[Entry], point: str, terminal: Chain) -> Chain:
    """The onion of one hook point in ``run``: first entry outermost, ``terminal`` in the middle. Without entries it is ``terminal`` itself.

    Where ``run.check_finite`` says so, every value that passes is looked at.
    """
    finite = run.check_finite
    chain = watched(terminal, point, inner=True) if finite else terminal
    for entry in reversed(entries):
        chain = _layer(run, entry, point, getattr(entry.plugin, point), chain)
    return watched(chain, point, inner=False) if finite else chain


CLEAN = ("pred_original_sample", "denoised")  # the clean sample in schedulers' output; latent consistency pipelines decode it
_UNASKED: Any = object()


def _layer(run: RunView, entry: Entry, point: str, method: Callable[[Any, Chain], Any], inner: Chain) -> Chain:
    form, finite, fired = FORMS[point], run.check_finite, run.report_of(entry).fired

    def around(call: Call) -> Any:
        if run.alone is not None and run.alone is not entry:  # a gradient pass of another plugin
            return inner(call)
        outer, call.entry = call.entry, entry  # whose ``call.state`` and ``call.config`` it is
        fired[point] = fired.get(point, 0) + 1
        is_open, came, foreign = True, _UNASKED, None

        def next(given: Any) -> Any:
            nonlocal came, foreign
            if not is_open:
                raise late(entry, point)
            if given is not call:
                ensure_call(given, entry, point, call)
                if finite:
                    ensure_finite_given(given, entry, point, call)
            try:
                out = inner(given)
            except Exception as error:
                foreign = error
                if given is not call:
                    add_note(error, f"{place(entry, point, call)} had changed the call before")
                raise
            came = out if given is call else None
            return out

        try:
            result = method(call, next)
        except Exception as error:
            if error is not foreign:
                add_note(error, f"raised in {place(entry, point, call)}")
            raise
        finally:
            is_open = False
            call.entry = outer
        if result is came and came is not None:  # as it came from further in, where it fitted
            return result
        if came is _UNASKED:
            run.answered(entry, point)
        if wrong := form(call, result):
            raise BrokenPlugin(f"{place(entry, point, call)}: it gave {wrong}")
        if finite:
            ensure_finite_result(result, entry, point, call)
        return result

    return around


def call_inner(call: Call) -> Any:
    """The middle of most onions: what was there before."""
    return call.inner(*call.args, **call.kwargs)


def step_result(chain: Chain, call: StepCall) -> Any:
    """Run the step onion and give the result back in the form that the pipeline asked for."""
    raw: list[Any] = []
    call.inner = _remember(call.inner, raw)
    out = chain(call)
    if raw and all(map(is_, (out.sample, out.x0), _parts_of(raw[-1]))):
        return raw[-1]
    if call.get("return_dict", True):
        old = raw[-1] if raw else SchedulerOutput(prev_sample=out.sample)
        new = {"prev_sample": out.sample} | ({} if out.x0 is None else dict.fromkeys(CLEAN, out.x0))
        return type(old)(**{name: new.get(name, value) for name, value in old.items()})
    rest = raw[-1][1:] if raw else ()
    return (out.sample, *(rest if out.x0 is None or not rest else (out.x0, *rest[1:])))


def _remember(inner: Callable[..., Any], raw: list[Any]) -> Callable[..., Any]:
    def stepping(*args: Any, **kwargs: Any) -> Any:
        raw.append(inner(*args, **kwargs))
        return raw[-1]

    return stepping


def _parts_of(raw: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(raw, tuple):
        return raw[0], next(iter(raw[1:]), None)
    return raw.prev_sample, next((raw[name] for name in CLEAN if name in raw), None)


def step_terminal(call: StepCall) -> StepOutput:
    """The middle of the ``step`` onion: the scheduler's own step, in one form."""
    sample, x0 = _parts_of(call_inner(call))
    call.run.forms["step"] = sample.dtype
    return StepOutput(sample, x0)


def schedule_terminal(call: ScheduleCall) -> Schedule:
    """The middle of the ``schedule`` onion."""
    call_inner(call)
    made = Schedule(call.scheduler.timesteps, getattr(call.scheduler, "sigmas", None))
    return made if call.run.replaced is None else call.run.replaced.levels(call, made)


def denoise_terminal(call: DenoiseCall) -> Tensor:
    """The middle of the ``denoise`` onion: the denoiser itself."""
    call.run.reached.add("denoiser")
    call.run.ran(call.branch)
    ensure_whole(call)
    out = forwarded(call, call.inner)
    call.run.heard.append(call.companion_of(out) if call.family.companion else None)
    call.run.forms[call.model_name, call.sample.shape] = out.shape, out.dtype
    return out


def stream_terminal(call: BlockCall | AttentionCall) -> Any:
    """The middle of the onions of a block and of an attention layer."""
    return remember(call, call.info, call.inner(*call.args, **call.kwargs))


def control_terminal(call: ControlCall) -> Any:
    """The middle of the ``control`` onion: the ControlNet itself."""
    return remember(call, call.model, call_inner(call))


def guide_terminal(call: GuideCall) -> Tensor:
    """The middle of the ``guide`` onion: the pipeline's own combination, as it was computed."""
    return call.combined


class Onions:
    """The composed onions of one stack; None where no plugin implements the point, so that its cost is nothing."""

    def __init__(self, run: RunView, entries: Sequence[Entry]) -> None:
        def at(point: str) -> list[Entry]:
            return [entry for entry in entries if point in entry.plugin.points()]

        self.schedule = compose(run, at("schedule"), "schedule", schedule_terminal)
        self.control = compose(run, at("control"), "control", control_terminal)
        self.denoise = compose(run, at("denoise"), "denoise", denoise_terminal)
        self.guide = compose(run, at("guide"), "guide", guide_terminal) if at("guide") else None
        self.step = compose(run, at("step"), "step", step_terminal) if at("step") else None


@contextmanager
def running(run: RunView | None) -> Iterator[None]:
    """Make ``run`` the active one of this thread (None: no run)."""
    outer = active_run()
    _thread.run = run
    try:
        yield
    finally:
        _thread.run = outer


class Outside(StandIn):
    """A user's callback in a run: what it calls (this denoiser, another pipeline that shares it) is no part of the run, so no hook fires.

    Pipelines ask it for ``PipelineCallback`` and its ``tensor_inputs``.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with running(None):
            return self.__dict__["_thing"](*args, **kwargs)


def outside(call: Call) -> Call:
    """The ``run`` call with the user's callbacks outside."""
    given = {name: value for name, value in call.arguments().items() if "callback" in name and callable(value)}
    return call.replace(**{name: Outside(value) for name, value in given.items()}) if given else call  # type: ignore[no-any-return]
