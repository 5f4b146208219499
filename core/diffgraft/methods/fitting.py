"""``fit``: what a plugin's :class:`~diffgraft.methods.fitter.Fitter` builds, moved by gradient descent, and written as one file.

The state (weights, optimizer, average, losses) lies in ``OUT.partial/``, the whole of it or the one before. Everything else, the order of
the data and every draw, follows from the seed and the number of the step: a fit that was interrupted anywhere ends bit for bit where an
uninterrupted one does.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.installed.anatomy import denoisers_of, root_of
from diffgraft.installed.errors import BrokenPlugin, ConfigError, NotFinite, OutputError
from diffgraft.installed.plugin import Plugin
from diffgraft.installed.registry import find_family
from diffgraft.kernel.defaults import filled, plain_class
from diffgraft.kernel.given import ensure_family
from diffgraft.kernel.stack import PluginStack, ensure_bare
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import OnProgress, plain, resume
from diffgraft.methods.conditioning import sibling
from diffgraft.methods.examples import Example, digest_of, ensure_examples, pixels_of
from diffgraft.methods.files import check_file, partial_of, work_digest
from diffgraft.methods.fitter import Batch, Fitter
from diffgraft.methods.gradients import frozen
from diffgraft.methods.inputs import CallSettings, call_arguments
from diffgraft.methods.named import declared
from diffgraft.methods.search import look
from diffgraft.methods.variants import own_size
from diffgraft.methods.watching import watching

AHEAD = 20
"""Steps after which an accelerator is waited for, to see whether their losses are finite."""
PARTS = 100
"""Parts of a fit whose mean losses are kept with the result."""


@dataclass(frozen=True)
class FitPlan:
    """How long a fit goes.

    steps       of the optimizer
    batch       examples in each
    seed        of everything that is drawn
    keep_every  seconds after which the state is written
    """

    steps: int
    batch: int = 8
    seed: int = 0
    keep_every: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"fit: {name} = {getattr(self, name)}: at least 1")

    def drawn(self, *what: int) -> int:
        """A seed that follows from this plan's and from some numbers."""
        return int.from_bytes(hashlib.sha256(repr((self.seed, *what)).encode()).digest()[:7], "big")

    def rows(self, step: int, examples: int) -> list[int]:
        """Which examples a step takes: all of them in a new order, then all again."""
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {epoch: self._order(epoch, examples) for epoch in {place // examples for place in places}}
        return [orders[place // examples][place % examples] for place in places]

    def _order(self, epoch: int, examples: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.drawn(0, epoch))
        return torch.randperm(examples, generator=generator).tolist()  # type: ignore[no-any-return]


class Learning:
    """What moves in a fit."""

    def __init__(self, fitter: Fitter, steps: int) -> None:
        self.fitter = fitter
        self.steps = steps
        self.step = 0
        self.live = fitter.values()
        self.moving = {name: value for name, value in self.live.items() if isinstance(value, nn.Parameter) and value.requires_grad}
        if not self.moving:
            raise BrokenPlugin(f"{fitter.plugin.name}: {type(fitter).__name__}.build gave a module without weights")
        self.optimizer = fitter.optimizer(self.moving.values())
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = {name: value.detach().clone() for name, value in self.moving.items()} if fitter.ema else {}
        self.losses: list[float] = []
        self._unseen: list[Tensor] = []

    def down(self, loss: Tensor) -> None:
        """One step of the optimizer; no gradient of anything else is kept."""
        share = self.fitter.factor(self.step, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        moving = list(self.moving.values())
        loss.backward(inputs=moving)
        if self.fitter.clip is not None:
            nn.utils.clip_grad_norm_(moving, self.fitter.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            decay = min(self.fitter.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.average.values()), [value.detach() for value in moving], 1 - decay)
        self._unseen.append(loss.detach())
        self.step += 1

    def first_bad(self) -> int | None:
        """The first step since the last look whose loss is not finite; waits for the device."""
        new = torch.stack(self._unseen).tolist() if self._unseen else []
        begin, self._unseen = len(self.losses), []
        self.losses += new
        return next((begin + i for i, loss in enumerate(new) if not math.isfinite(loss)), None)

    def is_finite(self) -> bool:
        """Whether all weights are; waits for the device."""
        return bool(torch.stack([value.detach().isfinite().all() for value in self.moving.values()]).all())

    def values(self) -> dict[str, Tensor]:
        """What is kept in the end."""
        return {**self.live, **self.average}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, facts) that :meth:`go_on` takes."""
        tensors = {f"value.{name}": value for name, value in self.live.items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        facts: dict[str, Any] = {}
        for number, kept in self.optimizer.state_dict()["state"].items():
            for key, value in kept.items():
                (tensors if isinstance(value, Tensor) else facts)[f"optimizer.{number}.{key}"] = value
        return tensors, {"step": self.step, "optimizer": facts}

    def go_on(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Where a state was written."""
        with torch.no_grad():
            for kind, here in (("value", self.live), ("average", self.average)):
                for name, value in here.items():
                    value.copy_(tensors[f"{kind}.{name}"])
        kept: dict[int, dict[str, Any]] = {}
        for name, value in {**tensors, **facts["optimizer"]}.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                kept.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})
        self.step, self.losses = facts["step"], tensors["losses"].tolist()


def fit(
    pipe: Any,
    plugin: Plugin,
    examples: Sequence[Example],
    settings: CallSettings,
    out: str | os.PathLike[str],
    plan: FitPlan,
    *,
    knobs: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Artefact:
    """Learn what ``plugin`` needs on this pipeline and write it to ``out``; the pipeline stays as it was, its weights too.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        examples: what is learned from, see ``Fitter.wants``.
        settings: of the calls that the result is for: steps of the solver, guidance scale, size.
        knobs: of the fitter.

    Raises:
        Unsupported: the plugin learns nothing, or does not work on this pipeline.
        Conflict: there are plugins on the pipeline.
        ConfigError: there is nothing to learn from, ``out`` cannot be written, or is an unfinished fit of something else.
        NotFinite: a loss is no finite number; the last good state is kept.
        OutputError: the disk takes no more; likewise.
    """
    out = Path(out)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"a fit is the work of one process, not of {processes}: no `accelerate launch`, no `torchrun`")
    fitter: Fitter = declared(plugin, "fitting")(plugin, **(knobs or {}))
    ensure_bare(pipe, f"what {plugin.name} learns on must be the plain pipeline")
    ensure_family(plugin, find_family(type(pipe)), plain_class(type(pipe)))
    fitter.ensure_writable(pipe)
    settings = fitter.suits(settings)
    ensure_examples(pipe, examples, fitter.wants, plugin.name)
    check_file(out, [".safetensors"])
    examples = list(examples) or [Example()]
    fitter.ensure_enough(pipe, examples, (plan.rows(step, len(examples)) for step in range(plan.steps)))

    def call(work: Any) -> Any:
        return work(**call_arguments(work, [examples[0].sample(0)], settings))

    with beginning(pipe, plugin, fitter, call, settings, plan.seed) as (stack, artefact):
        what: dict[str, Any] = {
            "knobs": plugin.config.model_dump(mode="json", exclude={need.knob for need in plugin.needs}),
            "fitter": [type(fitter).__qualname__, fitter.config.model_dump(mode="json")],
            "plan": {**asdict(plan), "keep_every": None},
            "examples": digest_of(examples),
            "call": plain(settings),
            "model": asdict(artefact.made_for),
        }
        digest = work_digest(what)
        learning = learn(stack, fitter, examples, plan, artefact, digest, out, on_progress)
        about = {**asdict(plan), "knobs": what["fitter"][1], "losses": by_parts(learning.losses)}
        values = {name: value.detach() for name, value in fitter.to_keep(learning.values()).items()}
        artefact = replace(artefact, tensors=values, facts={**artefact.facts, **fitter.facts(), "fit": about})
        with writing(out, f"all that was learned is kept in {partial_of(out)}"):
            fitter.write(artefact, out)
    shutil.rmtree(partial_of(out))
    return artefact


def fit_call(pipe: Any, plugin: Plugin, call: Callable[[Any], Any], seed: int = 0) -> Artefact:
    """What a fit for the run ``call(pipe)`` begins with, nothing learned: enough for a test on random weights; nothing is written.

    Raises:
        Unsupported: the plugin learns nothing, or does not work on this pipeline.
    """
    fitter: Fitter = declared(plugin, "fitting")(plugin)
    with beginning(pipe, plugin, fitter, call, CallSettings(), seed) as (_, artefact):
        values = {name: value.detach().clone() for name, value in fitter.to_keep(fitter.values()).items()}
        return replace(artefact, tensors=values, facts={**artefact.facts, **fitter.facts()})


@contextmanager
def beginning(
    pipe: Any, plugin: Plugin, fitter: Fitter, call: Callable[[Any], Any], settings: CallSettings, seed: int
) -> Iterator[tuple[PluginStack, Artefact]]:
    """``fitter``, built, on a pipeline of the same parts, and its artefact without tensors; torch's own draws are put back in the end."""
    work = sibling(pipe)
    if fitter.trains == "denoiser":  # it moves, so it is a copy
        name, model = next(iter(denoisers_of(pipe, find_family(type(pipe))).items()))
        work.register_modules(**{name: deepcopy(root_of(model))})
    device = work._execution_device
    with ExitStack() as held:
        held.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for part in work.components.values():
            if isinstance(part, nn.Module):
                held.enter_context(frozen(part))
        probe, fits, guidance = look(work, plugin, lambda: call(work))
        stack = held.enter_context(watching(work, plugin, fitter))
        torch.manual_seed(seed)
        fitter.begin(probe, settings)
        if fitter.trains != "denoiser":
            fitter.trained.to(device)
            parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
            own = {id(value) for part in parts for value in part.parameters()}
            if shared := [name for name, value in fitter.values().items() if id(value) in own]:
                raise BrokenPlugin(
                    f"{plugin.name}: {type(fitter).__name__}.build gave {shared[0]}, a weight of the pipeline itself, which does not move; "
                    "copy it, or be a LoraFitter"
                )
        fitter.trained.train()
        yield stack, Artefact(fits, {}, {"guidance_scale": guidance}, kind="fit")


def learn(
    stack: PluginStack,
    fitter: Fitter,
    examples: Sequence[Example],
    plan: FitPlan,
    empty: Artefact,
    digest: str,
    out: Path,
    on_progress: OnProgress | None,
) -> Learning:
    """All steps from where the state says; the state is written before the first one, so that a disk that takes none is found out."""
    path = partial_of(out) / "state.safetensors"
    learning = Learning(fitter, plan.steps)
    if path.exists():
        state = resume(path, fitter.plugin.name, digest, "fit")
        learning.go_on(state.tensors, state.facts)
    waits = 1 if stack.pipe._execution_device.type == "cpu" else AHEAD
    kept_at, kept_step, written = time.monotonic(), learning.step, path.exists()

    def refuse(step: int, what: str) -> None:
        batch = ", ".join(examples[row].label for row in plan.rows(step, len(examples)))
        raise NotFinite(
            f"fit of {fitter.plugin.name}: {what} at step {step}, batch: {batch}; "
            f"the state after {kept_step} steps is kept in {path.parent}. "
            "Going on would come to the same: delete it, and take a smaller rate, or mend the batch"
        )

    def keep() -> None:
        if not learning.is_finite():
            refuse(learning.step - 1, "a weight is no finite number")
        tensors, facts = learning.state()
        with writing(path, f"the state after {kept_step} steps is kept" if path.exists() else "nothing was learned yet"):
            Artefact(empty.made_for, tensors, {**facts, "digest": digest}).save(path)

    if not written:
        keep()
    with Loader(stack.pipe, fitter, examples, plan) as load:
        for step in range(learning.step, plan.steps):
            learning.down(loss_of(stack, fitter, load(step), plan))
            last, due = learning.step == plan.steps, time.monotonic() - kept_at >= plan.keep_every
            if last or due or learning.step % waits == 0:
                if (bad := learning.first_bad()) is not None:
                    refuse(bad, f"the loss is {learning.losses[bad]}")
                if due or last:
                    keep()
                    kept_at, kept_step = time.monotonic(), learning.step
            if on_progress:
                on_progress("fit", learning.step, plan.steps)
    return learning


def loss_of(stack: PluginStack, fitter: Fitter, batch: Batch, plan: FitPlan) -> Tensor:
    """The mean loss of a batch, with its graph; the plugin's own hooks keep nothing for the next one."""
    torch.manual_seed(plan.drawn(2, batch.step))
    batch = replace(batch, made=fitter.rollout(stack.pipe, batch))
    arguments = filled(stack.pipe, (), fitter.arguments(batch))
    with torch.enable_grad(), stack.session(arguments, scheduler=fitter.probe.scheduler, generator=batch.generator) as session:
        loss = fitter.loss(session, batch)
    rows = len(batch.examples)
    if not isinstance(loss, Tensor) or loss.shape != (rows,) or not loss.requires_grad:
        shape = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise BrokenPlugin(f"{fitter.plugin.name}: {type(fitter).__name__}.loss gave {shape}; wanted is [{rows}], with gradients")
    return loss.mean()


class Loader:
    """Batches by the number of their step; the pictures of the next one are read while this one is learned from."""

    def __init__(self, pipe: Any, fitter: Fitter, examples: Sequence[Example], plan: FitPlan) -> None:
        self.examples, self.plan = examples, plan
        self.device = pipe._execution_device
        height, width = fitter.settings.height, fitter.settings.width
        size = (height, width) if height and width else own_size(pipe)
        self.size = size if "pictures" in fitter.wants else None
        if "pictures" in fitter.wants and size is None:
            raise ConfigError(f"{type(pipe).__name__} does not say how large its pictures are: give --height and --width")
        self.reader = ThreadPoolExecutor(1, "diffgraft-pictures")
        self.ahead: dict[int, Any] = {}

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.reader.shutdown(cancel_futures=True)

    def taken(self, step: int) -> tuple[Example, ...]:
        return tuple(self.examples[row] for row in self.plan.rows(step, len(self.examples)))

    def __call__(self, step: int) -> Batch:
        examples, pixels = self.taken(step), None
        if self.size is not None:
            read = self.ahead.pop(step, None) or self.reader.submit(pixels_of, examples, *self.size)
            if step + 1 < self.plan.steps:
                self.ahead[step + 1] = self.reader.submit(pixels_of, self.taken(step + 1), *self.size)
            pixels = read.result().to(self.device, non_blocking=True)
        return Batch(step, examples, pixels, torch.Generator().manual_seed(self.plan.drawn(1, step)))


@contextmanager
def writing(path: Path, kept: str) -> Iterator[None]:
    """Raises OutputError where the disk takes no more; ``kept`` says what there is all the same."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{error.filename or path}: {error.strerror or error}; {kept}. Make room: the same call goes on") from error


def by_parts(losses: Sequence[float]) -> list[float]:
    """The means of equal parts of a fit."""
    size = max(1, -(-len(losses) // PARTS))
    return [math.fsum(losses[i : i + size]) / len(losses[i : i + size]) for i in range(0, len(losses), size)]
