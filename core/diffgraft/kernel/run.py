"""One run: which step, which branch, whose state - and the functions that the slots lead to, each through its onion (``onion.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import ControlCall, DenoiseCall, RunView, ScheduleCall, StepCall
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.facts import Pace, RunBound, ScheduledCopy, Step, pace_of
from diffgraft.kernel.guidance import branches_on, fill_rows, guided, without_variance
from diffgraft.kernel.onion import Chain, Onions, active_run, call_inner, step_result
from diffgraft.kernel.ranks import STAND_IN, groups_of, of_the_first
from diffgraft.kernel.slots import interrupt, left_behind, set_alike, striding, write_schedule
from diffgraft.kernel.speech import answer, companion_for, heard
from diffgraft.kernel.units import Replaced, begin_of
from diffgraft.stacks.report import PluginReport, Report, tensor_bytes


class Run:
    """One ``pipe(...)`` call in progress."""

    def __init__(self, pipe: Any, family: Family, entries: Sequence[Entry], check_finite: bool = False) -> None:
        self.pipe = pipe
        self.family = family
        self.entries = entries
        self.check_finite = check_finite
        self.arguments: Mapping[str, Any] = {}
        self.report = Report(plugins={entry.name: PluginReport() for entry in entries})
        self.reached: set[str] = set()
        """Hook points whose slots were reached, whether or not an outer plugin let the call through."""
        self.forms: dict[Any, Any] = {}
        """What the pipeline's own parts gave in this run, by part: type and length, or shape and dtype. Plugins are held to it."""
        self.acted: set[Entry] = set()
        """Plugins that left a call out, or did their work in another way."""
        self.answers: dict[str, Entry] = {}
        """By hook point: the plugin that answered it without ``next`` first."""
        self.promised: set[str] = set()
        self._states: dict[tuple[Entry, str | None], Any] = {}
        self.branch: str | None = None
        self.alone: Entry | None = None
        """Whose gradient pass is in progress: no other plugin's hooks fire in it."""
        self.predictions: dict[str, Tensor] = {}
        self.companions: dict[str, Tensor] = {}
        self.heard: list[Any] = []  # of a companion, what the forwards of the denoiser call in progress gave
        self._last_call: Any = None
        self.rows = 0
        self.in_step: tuple[str, ...] = ("cond",)
        """Rows and guidance branches of the first denoiser call of the step."""
        self.context: str | None = None
        self.carried: Tensor | None = None
        self.unscaled: Tensor | None = None
        self.scale_model_input: Callable[..., Tensor] | None = None
        self.replaced: Replaced | None = None
        """The pipeline's own scheduler, where a plugin's is in its place."""
        self.strides: list[int] = []
        """How far each step goes down, where the schedule was edited and the scheduler would not follow by itself."""
        self._scheduler: Any = None
        """The one that made the schedule."""
        self._cut_off = 0
        """Timesteps of the scheduler's own schedule that were cut off at its end."""
        self._edited = False
        """Whether a plugin has changed the schedule."""
        self.copies: list[ScheduledCopy] = []
        """Of the scheduler, that the pipeline has made in this pass or window."""
        self._copy: ScheduledCopy | None = None  # that is stepping
        self.outer: RunView | None = active_run()
        """The run of this thread in which a plugin began this one: it ends with it."""
        self._stopped = False
        self._groups: tuple[Any, ...] | None = None
        """Process groups of the ranks that run the denoisers together; looked up when a plugin first asks."""
        self._passes = 0
        self._in_loop = False
        """Whether this pass has come to ``set_timesteps``: before that the pipeline says what it was told in its last call."""
        self.bound = [
            (value, need.fits) for entry in entries for need in entry.plugin.needs if isinstance(value := entry.given[need.knob], RunBound)
        ]
        """What a plugin was given that fits certain runs only; held against this one at its first denoiser call."""
        self._begin_schedule()

    # state and report -------------------------------------------------------------------------------------------------------------

    def state(self, entry: Entry, branch: str | None) -> Any:
        key = (entry, branch)
        found = self._states.get(key)
        if found is None:
            found = self._states[key] = entry.plugin.State()
        return found

    def report_of(self, entry: Entry) -> PluginReport:
        return self.report.plugins[entry.name]

    def agree(self, value: Any) -> Any:
        """See :meth:`Call.agree`."""
        if (stand_in := STAND_IN.get()) is not None:
            return stand_in(value)
        if self._groups is None:
            self._groups = groups_of(getattr(self.pipe, name, None) for name in self.family.denoisers)
        return of_the_first(value, self._groups, self.pipe._execution_device) if self._groups else value

    def answered(self, entry: Entry, point: str) -> None:
        """A plugin answered a call itself, so that nothing further in was asked."""
        self.acted.add(entry)
        self.answers.setdefault(point, entry)

    def ran(self, branch: str | None) -> None:
        """The denoiser is about to compute."""
        forwards = self.report.forwards
        forwards[branch or "cond"] = forwards.get(branch or "cond", 0) + 1

    def promise(self, point: str, some: bool) -> None:
        """At least one block, attention layer or ControlNet was found, so the point must be reached."""
        if some:
            self.promised.add(point)

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        """The pipeline is about to run (again): fresh state for all; a plugin that wraps ``run`` keeps its shared one over its passes."""
        self.arguments = arguments
        if self._passes:  # the pipeline is about to forget it
            self._stopped |= is_interrupted(self.pipe)
        self._passes += 1
        self._in_loop = False
        if self.replaced is not None:
            self.replaced.check(arguments, self.report.plugins[self.replaced.by].notes)
        self._begin_anew()

    def _begin_anew(self) -> None:
        for entry, branch in list(self._states):
            if branch is not None or "run" not in entry.plugin.points():
                del self._states[entry, branch]
        self._begin_schedule()

    def end_pass(self, result: Any) -> None:
        """The pipeline has run, to its end or to where the user ended it."""
        self.forms["run"] = result.__class__, 0
        if self._copies_stepped:
            self._advance()
        self._stopped |= is_interrupted(self.pipe)

    @property
    def stopped(self) -> bool:
        """Whether the user has ended this call (``pipe._interrupt``)."""
        return self._stopped or (self._in_loop and is_interrupted(self.pipe)) or (self.outer is not None and self.outer.stopped)

    def end(self) -> None:
        """Free everything that the run held."""
        known: dict[Entry, set[int]] = {}  # a plugin's branches may share what they hold
        for (entry, _), state in self._states.items():
            self.report_of(entry).state_bytes += tensor_bytes(state, known.setdefault(entry, set()))
        self._states.clear()
        self.predictions, self.companions, self.heard, self.copies = {}, {}, [], []
        self.carried = self.unscaled = self.scale_model_input = self._last_call = None
        self.arguments = {}

    # the timestep schedule --------------------------------------------------------------------------------------------------------

    def _begin_schedule(self) -> None:
        self.calls = 0
        """``scheduler.step`` calls since ``set_timesteps``."""
        self._pace: Pace | None = None
        self._step: Step | None = None
        self._begin: int | None = None
        self._asked: list[str] = []
        """Names of the denoiser calls of this step."""
        self.copies = []
        self._copies_stepped = self._own_stepped = False
        """Whether copies of the scheduler, or itself, have stepped since the last denoiser call."""
        self.predictions = {}
        self.carried = self.unscaled = None

    @property
    def step(self) -> Step:
        if self._step is None:
            here = self.step_at(0)
            self._step = here if self._copy is None else self._copy.place(here)
        return self._step

    @property
    def pace(self) -> Pace:
        """How many ``scheduler.step`` calls the steps of this run take."""
        if self._pace is None:
            self._pace = pace_of(self.pipe.scheduler)
        return self._pace

    def step_at(self, ahead: int) -> Step:
        """Where the run is ``ahead`` ``scheduler.step`` calls from now."""
        scheduler, pace = self.pipe.scheduler, self.pace
        timesteps = scheduler.timesteps
        begin, whole = self._begin or 0, len(timesteps)
        calls = self.planned_calls() or whole - begin
        call = self.calls if ahead == 0 else min(self.calls + ahead, max(calls, whole - begin) - 1)
        position = min(begin + call, whole - 1)
        sigmas = getattr(scheduler, "sigmas", None)
        sigma = sigmas[position] if isinstance(sigmas, Tensor) and position < len(sigmas) else None
        index = pace.step_of(call)
        starts, ends = pace.call_of(index), pace.call_of(index + 1)
        return Step(
            index,
            pace.steps_in(calls),
            timesteps[position],
            sigma,
            pace.steps_in(whole) - pace.steps_in(whole - begin),
            call,
            calls,
            call - starts,
            min(ends, max(calls, call + 1)) - starts,
            whole - 1 - position + self._cut_off,
        )

    def planned_calls(self) -> int | None:
        """How many calls the pipeline says there will be. Before the first denoiser call its number is still that of the run before."""
        return getattr(self.pipe, "_num_timesteps", None) if self._begin is not None else None

    def start_of(self, step: int) -> Step:
        """Where the solver's step number ``step`` of this run begins."""
        return self.step_at(self.pace.call_of(step) - self.calls)

    def _locate(self, timestep: Any) -> None:
        """Where in the schedule this run begins, at its first timestep."""
        if self._begin is None:
            self._begin = begin_of(self.pipe.scheduler, timestep)

    # what the slots lead to -------------------------------------------------------------------------------------------------------

    def set_timesteps(self, chain: Chain, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> None:
        self.reached.add("schedule")
        scheduler = self.pipe.scheduler
        call = ScheduleCall(self, inner, names, args, kwargs)
        call.scheduler = scheduler
        schedule = chain(call)
        self.strides, self._cut_off, self._scheduler, self._edited = [], 0, scheduler, False
        if schedule.timesteps is not scheduler.timesteps or schedule.sigmas is not getattr(scheduler, "sigmas", None):
            self._cut_off = left_behind(schedule.timesteps, scheduler.timesteps)
            self._edited = True
            self.strides = write_schedule(scheduler, schedule.timesteps, schedule.sigmas)
        for each in self.copies if self.family.companion else ():
            set_alike(each.scheduler, scheduler)
        self._begin_schedule()
        self._in_loop = True
        if self._stopped:  # in an earlier pass, and the pipeline has forgotten it: no pass behind the stop computes anything
            interrupt(self.pipe)

    def control(self, chain: Chain, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
        self.reached.add("control")
        call = ControlCall(self, inner, names, args, kwargs)
        call.model = inner.__self__
        self._locate(call.get("timestep"))
        return chain(call)

    def denoise(self, onions: Onions, model_name: str, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
        self.reached.add("denoise")
        if self._copies_stepped:
            self._advance()
        self._own_stepped, self.heard, self.companions = False, [], self.companions if self._asked else {}
        call = DenoiseCall(self, inner, names, args, kwargs)
        if self.family.listed or self.family.layered:
            call = call.replace(**heard(self.family, call.arguments()))
        self._locate(call.get(self.family.timestep))
        if self.bound:
            self._ready(call, model_name)
        branch, branches = self._branch_of_call(call.sample.shape[0])
        call.branch, call.branches = branch, branches
        call.model, call.model_name = getattr(self.pipe, model_name), model_name
        self.report.shape = self.report.shape or tuple(call.sample.shape)
        calls = self.report.denoiser_calls
        calls[branch] = calls.get(branch, 0) + 1
        return_dict = call.get("return_dict", True)
        if return_dict:
            call = call.replace(return_dict=False)
        self.branch = branch
        try:
            prediction = onions.denoise(call)
        finally:
            self.branch = None
        second = companion_for(call, prediction) if self.family.companion else ()
        if onions.guide is not None:
            self._last_call = call
            for known, output in zip((self.predictions, self.companions), (prediction, *second), strict=False):
                known.update(zip(branches, output.chunk(len(branches)), strict=True))
        out = answer(self.family, prediction)
        return Transformer2DModelOutput(sample=out) if return_dict and not second else (out, *second)

    def _branch_of_call(self, rows: int) -> tuple[str, tuple[str, ...]]:
        """(branch, branches in the batch) of the denoiser call that begins now, which has so many rows.

        Raises:
            Unsupported: the rows are not those of the branches, or the family knows no such call.
        """
        guidance, asked = self.family.guidance, self._asked
        number = len(asked)
        if guidance.layout == "sequential":
            name = self.context or (guidance.order[number] if number < len(guidance.order) else "")
            if name and name not in asked:
                asked.append(name)
                return name, (name,)
        else:
            branches = branches_on(self)
            if number == 0 and rows % len(branches) == 0:
                self.rows, self.in_step = rows, branches
                asked.append(guidance.name_of(branches))
                return asked[0], branches
            extra = [name for name, _ in guidance.extra if name not in asked]
            if number and extra and rows * len(self.in_step) == self.rows:
                asked.append(name := self.context if self.context in extra else extra[0])
                return name, (name,)
        if asked and self.pipe.scheduler is not self._scheduler:
            asked.clear()  # it was exchanged in mid-run, so no step arrives here any more: the end of the run tells
            return self._branch_of_call(rows)
        before = f" after {', '.join(asked)}" if asked else ""
        raise Unsupported(
            f"denoiser call {number + 1} of a step came with {rows} rows{before}, and pipelines of family {self.family.name!r} make none "
            "like that: if something else (a hook, another pipeline) asks this denoiser during the run, let it do so in a step callback, "
            "which counts as outside"
        )

    def _ensure_rows(self, rows: int) -> None:
        """Raises Unsupported when the denoiser's rows were not the branches of a sample of so many rows."""
        expected = rows if self.family.guidance.doubled else rows * len(self.in_step)
        if self.rows != expected:
            raise Unsupported(
                f"the denoiser was asked for {self.rows} rows where {len(self.in_step)} guidance branch(es) of {rows} sample(s) were "
                f"expected: this {type(self.pipe).__name__} runs its guidance in another way than family {self.family.name!r} says"
            )

    def _ready(self, call: DenoiseCall, model_name: str) -> None:
        """Before the first denoiser call: scheduler, steps and size are known now, and nothing was computed yet."""
        guidance = self.guidance_scale(model_name)
        for thing, fits in self.bound:
            thing.ensure_run(self.pipe.scheduler, self.step.total, tuple(call.sample.shape[1:]), fits, guidance)
        self.bound = []

    def guidance_active(self) -> bool:
        """Whether batched guidance is on now; read live, because it can be cut in mid-run."""
        guidance = self.family.guidance
        if guidance.active is not None:
            return bool(getattr(self.pipe, guidance.active))
        given = not guidance.requires or any(self.arguments.get(name) is not None for name in guidance.requires)
        enough = all((self.arguments.get(name) or 0) >= value for name, value in guidance.least)
        return given and enough and (self.arguments.get(guidance.scale) or 0) > guidance.off

    def guidance_scale(self, model_name: str, argument: str | None = None) -> float | None:
        """The guidance scale in force now for one denoiser, or None: by how much cond - uncond counts over uncond."""
        scale = self._said_scale(model_name) if argument is None else getattr(self.pipe, f"_{argument}", self.arguments.get(argument))
        return scale + 1 - self.family.guidance.off if scale else scale

    def _said_scale(self, model_name: str) -> float | None:
        guidance, told = self.family.guidance, self.arguments.get
        if guidance.second_scale and model_name == self.family.denoisers[-1] and (second := told(guidance.second_scale)) is not None:
            return second  # type: ignore[no-any-return]
        live = getattr(self.pipe, f"_{guidance.scale}", None)
        return live if live is not None else told(guidance.scale)

    def note_scaling(self, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
        """``scheduler.scale_model_input``: remember what it was given, for plugins that edit the latents or ask the denoiser at others."""
        self.unscaled = kwargs["sample"] if "sample" in kwargs else args[0]
        self.scale_model_input = inner
        return inner(*args, **kwargs)

    def inside(self, point: str, kind: Any, chain: Chain, info: Any, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
        """A block's forward, or an attention layer's."""
        self.reached.add(point)
        call = kind(self, inner, names, args, kwargs, self.branch)
        call.info = info
        return chain(call)

    def scheduler_step(self, onions: Onions, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
        self.reached.add("step")
        if self.outer is not None and self.outer.stopped:  # a plugin began this run inside one that the user has ended
            self._stopped = True
            interrupt(self.pipe)
        scheduler = self.pipe.scheduler
        call = StepCall(self, inner, names, args, kwargs)
        call.scheduler, call.copy = scheduler, 0
        self._locate(call.get("timestep"))
        if self.carried is not None:
            call = call.replace(sample=fill_rows(self.carried, call.sample.shape[0]))
        if self._asked and self.family.guidance.layout != "sequential":
            self._ensure_rows(call.sample.shape[0])
        call = without_variance(call)
        if onions.guide is not None and "uncond" in self.predictions:
            self.reached.add("guide")
            call = guided(onions.guide, call, self._last_call, self.predictions)
        position = (self._begin or 0) + self.calls
        with striding(scheduler, self.strides[position] if position < len(self.strides) else None):
            result = call_inner(call) if onions.step is None else step_result(onions.step, call)
        self._advance()
        self._own_stepped = True
        return result

    def _advance(self) -> None:
        """A ``scheduler.step`` call is over."""
        self.report.steps += self.pace.is_start(self.calls)
        self.calls += 1
        self._step = None
        self._asked = []
        self.predictions = {}
        self.carried = self.unscaled = None
        self._copies_stepped = False

    def new_copy(self, scheduler: Any) -> ScheduledCopy:
        """The copy of the scheduler that the pipeline makes now. Copies after others have stepped begin a long video's next window of
        frames: another denoising, from noise on, so steps are counted and states begin anew, as in another pass."""
        if self._copies_stepped:
            self._advance()
            self._begin_anew()
        self.copies.append(made := ScheduledCopy(scheduler, len(self.copies) + 1))
        return made

    def copied_step(self, onions: Onions, copy: ScheduledCopy, inner: Any, names: Mapping[str, int], args: Any, kwargs: Any) -> Any:
        """A step of a copy of the scheduler, which the pipeline has made (one a frame, one for the sound). However many of them step
        after one denoiser call, they make one step of the run together, with that of the pipeline's own scheduler where there is one.
        Each is in its own place of the schedule, so `t`, `sigma` and `behind` are the copy's. A ``companion`` steps so, and guided.

        Raises:
            Unsupported: a plugin edits the latents or the guidance of a step, or the schedule, which a copy has from itself.
        """
        self.reached.add("step")
        edited = self.carried is not None or (onions.guide is not None and len(self.predictions) > 1) or self._edited
        if edited and not self.family.companion:
            what = "latents" if self.carried is not None else "schedule" if self._edited else "guidance"
            raise Unsupported(
                f"{type(self.pipe).__name__} steps copies of its scheduler, one for each part of the latents, and what a plugin changed in "
                f"the {what} does not reach them"
            )
        call = StepCall(self, inner, names, args, kwargs)
        call.scheduler, call.copy, call.branch = copy.scheduler, copy.number, f"copy {copy.number}"
        self._copies_stepped = not self._own_stepped  # else the run went on by that one already, and this belongs to the step before
        self.calls -= self._own_stepped
        self._step, self._copy = None, copy
        try:
            if onions.guide is not None and "uncond" in self.companions:
                call = guided(onions.guide, call, self._last_call, self.companions)
            return call_inner(call) if onions.step is None else step_result(onions.step, call)
        finally:
            self.calls += self._own_stepped
            self._step = self._copy = None
            copy.stepped += 1


def is_interrupted(pipe: Any) -> bool:
    """Whether somebody has told the pipeline to stop; one that knows no stop (DDPM, DiT) is never told."""
    return bool(getattr(pipe, "interrupt", False))
