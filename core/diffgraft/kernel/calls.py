"""What a hook sees: one small immutable call object per hook point.

Arguments are read by parameter name (``call["timestep"]``) however the pipeline passed them, and changed on a copy
(``next(call.replace(timestep=t))``), so calling ``next`` twice never applies a change twice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffgraft.installed.anatomy import AttentionInfo, BlockInfo
from diffgraft.installed.errors import NotPassed
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.entry import Entry
from diffgraft.kernel.facts import Step
from diffgraft.kernel.speech import Rows, accompanied, companion_of
from diffgraft.stacks.report import PluginReport


class RunView(Protocol):
    """What a call asks of the run that it belongs to (``run.Run``)."""

    pipe: Any
    family: Family
    entries: Sequence[Entry]
    arguments: Mapping[str, Any]
    alone: Entry | None
    branch: str | None
    carried: Tensor | None
    unscaled: Tensor | None
    scale_model_input: Callable[..., Tensor] | None
    reached: set[str]
    forms: dict[Any, Any]
    replaced: Any
    rows: int
    in_step: tuple[str, ...]
    heard: list[Any]
    check_finite: bool

    def answered(self, entry: Entry, point: str) -> None: ...
    def ran(self, branch: str | None) -> None: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def step(self) -> Step: ...
    def step_at(self, ahead: int) -> Step: ...
    def start_of(self, step: int) -> Step: ...
    def state(self, entry: Entry, branch: str | None) -> Any: ...
    def report_of(self, entry: Entry) -> PluginReport: ...
    def guidance_active(self) -> bool: ...
    def guidance_scale(self, model_name: str, argument: str | None = None) -> float | None: ...
    def agree(self, value: Any) -> Any: ...


class Call:
    """One call at one hook point, as the plugins see it. Treat it as immutable: ``replace`` gives a changed copy."""

    __slots__ = ("args", "branch", "entry", "inner", "kwargs", "names", "run")

    def __init__(
        self,
        run: RunView,
        inner: Callable[..., Any],
        names: Mapping[str, int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        branch: str | None = None,
    ) -> None:
        self.run = run
        self.entry: Entry = None  # type: ignore[assignment]  # set by the chain, before a plugin sees the call
        self.branch = branch
        self.inner = inner
        self.names = names
        self.args = args
        self.kwargs = kwargs

    def get(self, name: str, default: Any = None) -> Any:
        """The argument called ``name``, or ``default`` when the pipeline did not pass it."""
        if name in self.kwargs:
            return self.kwargs[name]
        position = self.names.get(name)
        return self.args[position] if position is not None and position < len(self.args) else default

    def __getitem__(self, name: str) -> Any:
        if name in self.kwargs:
            return self.kwargs[name]
        position = self.names.get(name)
        if position is None or position >= len(self.args):
            raise NotPassed(f"{name!r} was not passed to this {type(self).__name__}; passed: {', '.join(self.arguments()) or 'nothing'}")
        return self.args[position]

    def arguments(self) -> dict[str, Any]:
        """All passed arguments by parameter name."""
        return dict(zip(self.names, self.args, strict=False)) | self.kwargs

    def replace(self, **changes: Any) -> Any:
        """A copy with these arguments changed."""
        new = copy.copy(self)
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, value in changes.items():
            position = self.names.get(name)
            if name not in kwargs and position is not None and position < len(args):
                args[position] = value
            else:
                kwargs[name] = value
        new.args, new.kwargs = tuple(args), kwargs
        return new

    @property
    def step(self) -> Step:
        return self.run.step

    def step_at(self, ahead: int) -> Step:
        """Where the run is ``ahead`` ``scheduler.step`` calls after this one (0: here).

        Behind the run's last call comes the schedule's next one, where the run stops before the schedule's end; behind that comes itself.
        """
        return self.run.step_at(ahead)

    def start_of(self, step: int) -> Step:
        """Where the solver's step number ``step`` of this run begins, as a plan counts steps."""
        return self.run.start_of(step)

    @property
    def family(self) -> Family:
        return self.run.family

    @property
    def pipe(self) -> Any:
        return self.run.pipe

    @property
    def config(self) -> Any:
        return self.entry.plugin.config

    def given(self, knob: str) -> Any:
        """What the plugin declared in ``needs`` (an artefact, a second pipeline), by knob; None where the knob is None."""
        return self.entry.given[knob]

    @property
    def generator(self) -> Any:
        """The call's generator, a list of them (one a sample) or None: a plugin's noise is drawn from it too (see ``StepCall.noise``)."""
        return self.run.arguments.get("generator")

    @property
    def others(self) -> list[Plugin]:
        """The other plugins of this run, outermost first."""
        return [entry.plugin for entry in self.run.entries if entry is not self.entry]

    @property
    def stopped(self) -> bool:
        """Whether the user has ended this ``pipe(...)`` call. A further pass of the pipeline makes no step then: it only decodes."""
        return self.run.stopped

    @property
    def state(self) -> Any:
        """The plugin's own state for this run and branch: fresh at every run, freed at its end."""
        return self.run.state(self.entry, self.branch)

    @property
    def shared(self) -> Any:
        """The plugin's own state for this run, shared by all branches and hook points."""
        return self.run.state(self.entry, None)

    def agree(self, value: Any) -> Any:
        """``value`` (a bool, a number, a tensor) as the first of the ranks that run this denoiser together has it; itself without such.

        What decides by data whether a module runs must come through here: each rank sees other tokens, and where one skips what another
        runs, they wait for each other for ever. All ranks must come to the same calls of ``agree``.
        """
        return self.run.agree(value)

    def count(self, key: str, n: int = 1) -> None:
        """Add to a counter of the run's report ("skipped")."""
        self.run.report_of(self.entry).count(key, self.branch or "run", n)

    def acted(self) -> None:
        """Tell that the plugin did its work in this call, though ``next`` was asked: with the LoRA off, say. A plugin that skips, or
        replaces the denoiser, and never acts in a run is called inactive in the report; an answer without ``next`` is an act."""
        self.run.answered(self.entry, "")

    def record(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep tensors in the run's report, on the CPU, for whoever reads it after the run (log-probabilities, densities, statistics)."""
        self.run.report_of(self.entry).records.update({name: value.detach().cpu() for name, value in tensors.items()})

    def note(self, text: str) -> None:
        """Say something once in the run's report."""
        notes = self.run.report_of(self.entry).notes
        if text not in notes:
            notes.append(text)


class RunCall(Call):
    """One ``pipe(...)`` call. Arguments by name; ``next`` runs the pipeline and returns its output.

    ``said`` the names that the caller gave: the other arguments are a bundled checkpoint's own.
    """

    __slots__ = ("said",)
    said: frozenset[str]

    @property
    def extras(self) -> tuple[str, ...]:
        """The calls beyond guidance's branches that these arguments ask for, by the name that ``DenoiseCall.branch`` will have ("skip")."""
        return tuple(name for name, argument in self.family.guidance.extra if self.get(argument) is not None)


class ScheduleCall(Call):
    """``scheduler.set_timesteps``; ``next`` returns the :class:`Schedule` that the scheduler made."""

    __slots__ = ("scheduler",)
    scheduler: Any


class Schedule(NamedTuple):
    """timesteps [n] and sigmas [n + 1] (None where the scheduler has none) of a run."""

    timesteps: Tensor
    sigmas: Tensor | None


class DenoiseCall(Call):
    """One denoiser forward; ``next`` returns the prediction [rows, ...], a tensor.

    ``model`` the denoiser, ``model_name`` its attribute on the pipeline, ``branches`` the guidance branches in this call: the batch holds
    one equal part of rows for each. A call for something else (see ``extra``) has its own name there.
    """

    __slots__ = ("branches", "model", "model_name")
    companion_of = companion_of
    accompanied = staticmethod(accompanied)
    model: nn.Module
    model_name: str
    branches: tuple[str, ...]

    @property
    def sample(self) -> Tensor:
        """The denoiser's noisy input [rows, ...]: scaled by the scheduler, doubled for batched guidance."""
        return self[self.run.family.sample]  # type: ignore[no-any-return]

    @property
    def timestep(self) -> Tensor:
        """The denoiser's timestep, a 0-dim tensor or [rows]."""
        return self[self.run.family.timestep]  # type: ignore[no-any-return]

    @property
    def guided(self) -> bool:
        """Whether the pipeline asks for the guidance branches at this step, in this call or in one each."""
        return self.family.guidance.layout != "none" and self.run.guidance_active()

    @property
    def extra(self) -> bool:
        """Whether the pipeline asks for something else than its guidance branches: skip-layer guidance, a call that the family does not
        know. Its rows hold the conditional half's inputs."""
        return self.branches[0] not in self.family.guidance.order and self.branches[0] != "cond"

    @property
    def texts(self) -> tuple[str, ...]:
        """The branches whose conditioning the call's parts have: an extra call has that of "cond"."""
        return ("cond",) if self.extra else self.branches

    @property
    def latents(self) -> Tensor:
        """The pipeline's latents x_t [batch, ...] as ``scheduler.step`` will get them.

        Before ``scale_model_input`` where that is called (the plugin must edit "latents" or need "extra_forwards" or gradients for that),
        without guidance copies and appended channels. Appended tokens (the reference picture of Kontext or Qwen-Image-Edit) are in it.
        """
        run = self.run
        if run.carried is not None:
            return run.carried
        x = run.unscaled if run.unscaled is not None else self.sample
        x = x[: self.sample.shape[0] // len(self.branches)]
        if run.family.appended != "channels":
            return x
        axis, told = run.family.channel_axis, self.model.config["out_channels"]  # type: ignore[index]
        told = told // 2 if run.family.branch_prediction == "drop_sigma" else told  # type: ignore[operator]
        return x.narrow(axis, 0, min(x.shape[axis], told))  # type: ignore[no-any-return]

    def with_latents(self, latents: Tensor) -> DenoiseCall:
        """A copy whose denoiser input is made of ``latents``; ``scheduler.step`` gets them too.

        A pipeline keeps its latents in a local variable, so the core carries the edit from here to the step.
        """
        self.run.carried = latents
        return self.with_input(latents)

    def with_input(self, latents: Tensor) -> DenoiseCall:
        """The same for a denoiser call of the plugin's own: ``scheduler.step`` gets the pipeline's latents."""
        run, old = self.run, self.sample
        x = torch.cat([latents] * len(self.branches))
        if run.scale_model_input is not None:
            x = run.scale_model_input(x, run.step.t)
        differing = [d for d in range(1, x.ndim) if x.shape[d] != old.shape[d]]
        if differing and run.family.appended != "none":  # inpainting, image-to-video, Kontext: conditioning behind the latents
            d = differing[0]
            x = torch.cat([x, old.narrow(d, x.shape[d], old.shape[d] - x.shape[d]).to(x.dtype)], dim=d)
        return self.replace(**{run.family.sample: x.to(old.dtype)})  # type: ignore[no-any-return]

    def only(self, branch: str) -> DenoiseCall:
        """A copy that holds the rows of one guidance branch alone; a call of one branch (sequential guidance, none) stays as it is.

        Raises:
            KeyError: ``branch`` is not one of this call's ``branches``.
        """
        if branch not in self.branches:
            raise KeyError(f"{branch!r} is not in this denoiser call; it holds {', '.join(self.branches)}")
        n, number, rows = len(self.branches), self.branches.index(branch), self.sample.shape[0]
        part = {k: v if k in self.family.common else part_of(v, rows, n, number) for k, v in self.arguments().items()} if n > 1 else {}
        new: DenoiseCall = self.replace(**part)
        new.branch, new.branches = branch, (branch,)
        return new


def part_of(value: Any, rows: int, n: int, number: int) -> Any:
    """Part ``number`` of ``n`` of a denoiser argument of a batch of ``rows``: tensors that hold something for each row are cut, in lists
    and dicts too, and :class:`Rows`; the rest is common to all rows."""
    if isinstance(value, Tensor):
        for_rows = value.ndim > 0 and value.shape[0] > 0 and value.shape[0] % rows == 0
        return value.chunk(n)[number] if for_rows else value
    if isinstance(value, Rows):
        return Rows(value[number * len(value) // n : (number + 1) * len(value) // n])
    if isinstance(value, dict):
        return {key: part_of(item, rows, n, number) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(part_of(item, rows, n, number) for item in value)
    return value


class ControlCall(Call):
    """One forward of a ControlNet, which comes before the denoiser call of its step; ``next`` returns what the ControlNet returns.

    ``model`` the ControlNet (or the Multi one that holds several). It belongs to no branch: ``state`` is ``shared`` here.
    """

    __slots__ = ("model",)
    model: nn.Module


class BlockCall(Call):
    """One block's forward; ``next`` returns what the block returns (tensor or tuple, see ``info.returns``)."""

    __slots__ = ("info",)
    info: BlockInfo


class AttentionCall(Call):
    """One attention layer's processor call; ``next`` calls the processor that was there. ``attn`` is the attention module."""

    __slots__ = ("info",)
    info: AttentionInfo

    @property
    def attn(self) -> nn.Module:
        return self.info.module


class GuideCall(Call):
    """The branches of one step and the pipeline's own combination of them.

    ``branches`` predictions by name, in the layout of ``combined``; ``combined`` the pipeline's result, rescale included; ``scale`` the
    guidance scale (a number, or None where the pipeline has none). ``next`` returns ``combined`` exactly as it was computed. A companion's
    come here too, after those of the sample: ``copy``, as in :class:`StepCall`.
    """

    __slots__ = ("branches", "combined", "copy", "scale")
    copy: int
    branches: dict[str, Tensor]
    combined: Tensor
    scale: float | None

    @property
    def cond(self) -> Tensor:
        return self.branches["cond"]

    @property
    def uncond(self) -> Tensor:
        return self.branches["uncond"]


class StepCall(Call):
    """``scheduler.step``; arguments ``model_output``, ``timestep``, ``sample``; ``next`` returns a :class:`StepOutput`.

    ``scheduler`` whose step it is: the pipeline's, or a copy of it that the pipeline made in this run (one a frame, one for the sound);
    ``copy`` which one, in the order in which they were made; 0 for the pipeline's own. ``state`` is each copy's own, ``shared`` is not.
    """

    __slots__ = ("copy", "scheduler")
    scheduler: Any
    copy: int

    @property
    def model_output(self) -> Tensor:
        return self["model_output"]  # type: ignore[no-any-return]

    @property
    def sample(self) -> Tensor:
        return self["sample"]  # type: ignore[no-any-return]

    def noise(self) -> Tensor:
        """Standard normal noise like ``sample`` in float32, drawn from the call's generators; guidance copies of a sample get the same."""
        x = self.sample
        copies = 2 if self.family.guidance.doubled and self.run.guidance_active() else 1
        z = randn_tensor((x.shape[0] // copies, *x.shape[1:]), generator=self.generator, device=x.device, dtype=torch.float32)
        return z if copies == 1 else torch.cat([z] * copies)


@dataclass(frozen=True)
class StepOutput:
    """``sample`` x_{t-1}; ``x0`` the scheduler's estimate of the clean sample, None where it gives none."""

    sample: Tensor
    x0: Tensor | None = None


class ModulesCall(Call):
    """Surgery at attach time: ``denoisers`` by attribute name; ``swap`` exchanges a submodule or weight until the plugin is off."""

    __slots__ = ("denoisers", "swap")
    denoisers: Mapping[str, nn.Module]
    swap: Callable[[nn.Module, str, nn.Module | nn.Parameter], None]
