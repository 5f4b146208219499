"""What a plugin really does to a run, seen by two do-nothing neighbours, one on either side of it.

The outer one sees what the pipeline gives the plugin and what comes back, the inner one what the plugin hands on. What differs between the
two is the plugin's doing. Between them also lies who draws noise, takes gradients or waits for the device: every operation of torch
is seen by a dispatch mode, and belongs to the plugin while the outer neighbour was entered last.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.onion import active_run
from diffgraft.testing.watch import neighbour

POINTS = ("run", "schedule", "denoise", "block", "attention", "guide", "step")
PER_STEP = frozenset({"denoise", "block", "attention", "guide", "step"})
RANDOM = frozenset({"randn", "rand", "normal", "normal_", "uniform_", "bernoulli", "bernoulli_", "randint", "randperm", "multinomial"})
RANDOM_LIKE = frozenset({"randn_like", "rand_like", "randint_like", "random_", "exponential_", "cauchy_", "log_normal_", "native_dropout"})
CONTENT = ("prompt", "prompt_2", "prompt_3", "prompt_embeds", "negative_prompt", "negative_prompt_embeds", "class_labels")


@dataclass
class Frame:
    """One call at one point: what the pipeline gave, and the inner calls that the plugin made of it."""

    point: str
    given: dict[str, Any]
    inner: list[tuple[dict[str, Any], Any]] = field(default_factory=list)


@dataclass
class Seen:
    """What was observed, each with where first. ``waits`` are (file, line) in the plugin's package."""

    skips: dict[str, str] = field(default_factory=dict)
    edits: dict[str, str] = field(default_factory=dict)
    draws: dict[str, str] = field(default_factory=dict)
    needs: dict[str, str] = field(default_factory=dict)
    waits: dict[tuple[str, int], str] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    sides: list[tuple[str, str]] = field(default_factory=list)
    """(whose turn it is, at which point), innermost last."""
    run: Any = None
    """The run that is watched: one inside it (a sibling is asked for the conditioning of a prompt) draws what does not count."""

    def is_plugins_turn(self) -> bool:
        return bool(self.sides) and self.sides[-1][0] == "plugin"

    def frame(self, point: str) -> Frame | None:
        return next((frame for frame in reversed(self.frames) if frame.point == point), None)


def same(given: Any, handed: Any) -> bool:
    """Whether ``handed`` is ``given``, or rows of it, or holds it among its rows."""
    if isinstance(given, Tensor) and isinstance(handed, Tensor):
        if given.ndim == 0 or handed.ndim == 0 or given.shape[1:] != handed.shape[1:]:
            return given.shape == handed.shape and bool(torch.equal(given, handed))
        few, many = sorted((given, handed), key=len)
        if len(few) == 0 or len(many) % len(few):
            return False
        return any(torch.equal(few, part) for part in many.split(len(few)))
    if isinstance(given, (list, tuple)) and isinstance(handed, (list, tuple)):
        return len(given) == len(handed) and all(map(same, given, handed))
    if isinstance(given, Tensor) or isinstance(handed, Tensor):
        return False
    try:
        return given is handed or bool(given == handed)
    except Exception:  # objects without a truth value are taken for what they are: another one
        return False


def neighbours(plugin: type[Plugin], seen: Seen) -> tuple[Plugin, Plugin]:
    """(outer, inner): put the plugin between the two."""
    return neighbour(plugin, "check_outer", POINTS, partial(outer, seen)), neighbour(plugin, "check_inner", POINTS, partial(inner, seen))


def facts(call: Any, point: str) -> dict[str, Any]:
    """What of a call is held against what is handed on."""
    family = call.family
    if point == "run":
        return call.arguments()  # type: ignore[no-any-return]
    if point == "denoise":
        conditioning = {name: call.get(name) for name in family.conditioning}
        return {"sample": call.sample, "timestep": call.timestep, "carried": call.run.carried, "conditioning": conditioning}
    if point == "step":
        return {"sample": call.sample, "model_output": call.model_output, "timestep": call["timestep"]}
    if point in ("block", "attention"):
        return {"arguments": call.arguments()}
    return {}


def outer(seen: Seen, point: str) -> Any:
    def around(self: Plugin, call: Any, next: Any) -> Any:
        frame = Frame(point, facts(call, point))
        seen.run = call.run
        seen.frames.append(frame)
        seen.sides.append(("plugin", point))
        try:
            result = next(call)
        finally:
            seen.sides.pop()
            seen.frames.pop()
        with quietly(seen):
            judge(seen, frame, call, result)
        return result

    return around


def inner(seen: Seen, point: str) -> Any:
    def around(self: Plugin, call: Any, next: Any) -> Any:
        frame = seen.frame(point)
        given = facts(call, point)
        seen.sides.append(("pipeline", point))
        try:
            result = next(call)
        finally:
            seen.sides.pop()
        if frame is not None:
            frame.inner.append((given, result))
        return result

    return around


@contextmanager
def quietly(seen: Seen) -> Iterator[None]:
    """What the neighbours compute themselves is nobody's doing."""
    seen.sides.append(("neighbour", ""))
    try:
        yield
    finally:
        seen.sides.pop()


def judge(seen: Seen, frame: Frame, call: Any, result: Any) -> None:
    """Note what the plugin did in one call that is over."""
    {"run": judge_run, "denoise": judge_denoise, "step": judge_step, "guide": judge_result, "schedule": judge_result}.get(
        frame.point, judge_part
    )(seen, frame, call, result)


def judge_run(seen: Seen, frame: Frame, call: Any, result: Any) -> None:
    given, handed = frame.given, [arguments for arguments, _ in frame.inner]
    scale = call.family.guidance.scale
    for name in {name for arguments in [given, *handed] for name in arguments}:
        what = {"height": "resolution", "width": "resolution", "latents": "latents", scale: "prediction"}.get(name)
        what = what or ("schedule" if name in ("num_inference_steps", "timesteps", "sigmas") else None)
        what = what or ("conditioning" if name in CONTENT else None)
        if what and any(not same(given.get(name), arguments.get(name)) for arguments in handed):
            seen.edits.setdefault(what, f"run hands on another {name}")
    if len(frame.inner) == 1 and not same(output_of(result), output_of(frame.inner[0][1])):
        seen.edits.setdefault("latents", "run returns another output than the pipeline's")


def output_of(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) or hasattr(result, "to_tuple") else result


def judge_denoise(seen: Seen, frame: Frame, call: Any, result: Any) -> None:
    given, handed = frame.given, [arguments for arguments, _ in frame.inner]
    if not handed:
        seen.skips.setdefault("denoiser", f"step {call.step.index}: a denoiser call was answered without the denoiser")
        return
    rows = sum(len(arguments["sample"]) for arguments in handed)
    if rows < len(given["sample"]):
        seen.skips.setdefault("branches", f"step {call.step.index}: {rows} of {len(given['sample'])} rows went to the denoiser")
    if rows > len(given["sample"]):
        seen.needs.setdefault(
            "extra_forwards", f"step {call.step.index}: {rows} rows went to the denoiser, {len(given['sample'])} were asked for"
        )
    for name, what in (("timestep", "timestep"), ("conditioning", "conditioning")):
        if not any(same_values(given[name], arguments[name]) for arguments in handed):
            seen.edits.setdefault(what, f"step {call.step.index}: the denoiser gets another {name}")
    carried = call.run.carried
    if carried is not None and not same(given["carried"], carried):
        seen.edits.setdefault("latents", f"step {call.step.index}: with_latents")
    elif not any(same(given["sample"], arguments["sample"]) for arguments in handed):
        size = all(given["sample"].shape[1:] != arguments["sample"].shape[1:] for arguments in handed)
        seen.edits.setdefault("resolution" if size else "latents", f"step {call.step.index}: the denoiser gets another sample")
    if len(handed) == 1 and not same(frame.inner[0][1], result):
        seen.edits.setdefault("prediction", f"step {call.step.index}: denoise returns another prediction than the denoiser's")


def same_values(given: Any, handed: Any) -> bool:
    if isinstance(given, dict):
        return all(same(value, handed.get(name)) for name, value in given.items())
    if isinstance(given, Tensor) and isinstance(handed, Tensor) and given.ndim <= 1 and handed.ndim <= 1:
        return bool(torch.isin(given.double().reshape(-1), handed.double().reshape(-1)).all())  # 0-dim or a row each
    return same(given, handed)


def judge_step(seen: Seen, frame: Frame, call: Any, result: Any) -> None:
    where = f"step {call.step.index}: "
    for name, what in (("sample", "latents"), ("model_output", "prediction"), ("timestep", "timestep")):
        if frame.inner and not any(same(frame.given[name], arguments[name]) for arguments, _ in frame.inner):
            seen.edits.setdefault(what, f"{where}the scheduler gets another {name}")
    if not any(same(output.sample, result.sample) for _, output in frame.inner):
        seen.edits.setdefault("latents", f"{where}step returns another sample than the scheduler's")


def judge_result(seen: Seen, frame: Frame, call: Any, result: Any) -> None:
    what, words = {"guide": ("prediction", "guide returns another prediction"), "schedule": ("schedule", "schedule returns other times")}[
        frame.point
    ]
    if not any(same(output, result) for _, output in frame.inner):
        seen.edits.setdefault(what, words + " than the pipeline's")


def judge_part(seen: Seen, frame: Frame, call: Any, result: Any) -> None:
    """A block or an attention layer."""
    where = f"step {call.step.index}, {call.info.path}: "
    if frame.point == "block" and not frame.inner:
        seen.skips.setdefault("blocks", f"{where}answered without the block")
    elif not any(same(output, result) and same_values(frame.given["arguments"], given["arguments"]) for given, output in frame.inner):
        what = "attention" if frame.point == "attention" else "features"
        seen.edits.setdefault(what, f"{where}another {'result' if frame.point == 'attention' else 'feature'} than the layer's own")


class Listening(TorchDispatchMode):
    """Sees every operation: what is drawn, differentiated or waited for while it is the plugin's turn."""

    def __init__(self, seen: Seen, package: Path) -> None:
        super().__init__()
        self.seen, self.package = seen, str(package)
        self.drawn_in_step = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        side, point = self.seen.sides[-1] if self.seen.sides else ("pipeline", "")
        if name in RANDOM or name in RANDOM_LIKE:
            if side == "plugin" and active_run() is self.seen.run:
                self.seen.draws.setdefault(point, f"{point}: torch.{name}")
            elif side == "pipeline" and point == "step":
                self.drawn_in_step += 1
        elif side == "plugin" and "backward" in name:
            self.seen.needs.setdefault("gradients", f"{point}: {name}")
        elif side == "plugin" and name == "_local_scalar_dense" and point in PER_STEP and (place := self.place()):
            self.seen.waits.setdefault(place, point)
        return func(*args, **(kwargs or {}))

    def place(self) -> tuple[str, int] | None:
        """The innermost line of the plugin's package that is being executed, unless the core lies below it."""
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_filename.startswith(self.package):
                return frame.f_code.co_filename, frame.f_lineno
            frame = frame.f_back  # type: ignore[assignment]
        return None
