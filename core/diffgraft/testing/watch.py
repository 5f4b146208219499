"""Do-nothing neighbours of a plugin: two around it, which see whether it writes into tensors that are not its own, and one inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from diffgraft.installed.plugin import Effects, Paper, Plugin

POINTS = ("denoise", "block", "attention", "guide", "step")


class Ledger:
    """Tensors that the plugin was given, each with its version counter, one frame a call."""

    def __init__(self) -> None:
        self.frames: list[list[tuple[Tensor, int]]] = []
        self.written: list[str] = []

    def enter(self, *values: Any) -> None:
        self.frames.append([(x, x._version) for x in tensors(values)])

    def verify(self, where: str) -> None:
        for x, version in self.frames[-1]:
            if x._version != version:
                self.written.append(f"{where}: a tensor of shape {tuple(x.shape)}")

    def renew(self, *values: Any) -> None:
        """What the middle did to the arguments is its own business; from here on they are the plugin's again, and the result with them."""
        old = [x for x, _ in self.frames[-1]]
        self.frames[-1] = [(x, x._version) for x in (*old, *tensors(values))]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for item in value.values() for x in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in tensors(item)]
    return tensors(vars(value)) if hasattr(value, "sample") and hasattr(value, "__dict__") else []


def watchers(plugin: type[Plugin]) -> tuple[Plugin, Plugin, Ledger]:
    """(outer, inner, ledger): put the plugin between the two."""
    ledger = Ledger()
    points = [point for point in plugin.points() if point in POINTS]
    outer = neighbour(plugin, "watch_outer", points, partial(_outer, ledger))
    return outer, neighbour(plugin, "watch_inner", points, partial(_inner, ledger)), ledger


def neighbour(plugin: type[Plugin], name: str, points: Iterable[str], hook: Callable[[str], Any]) -> Plugin:
    """A plugin that does nothing but look on: at each of ``points`` it has the method that ``hook(point)`` makes.

    It works wherever the ``plugin`` beside it does: on the same families, and with `guide`, which not all of them have, only beside one
    that has it.
    """
    body: dict[str, Any] = {point: hook(point) for point in points if point != "guide" or point in plugin.points()}
    body |= {
        "name": name,
        "paper": Paper("a neighbour", "", "sees what the plugin beside it does"),
        "families": plugin.families,
        "neutral": {},
        "select_blocks": lambda self, blocks: blocks,
    }
    beside: Plugin = type(name, (Plugin,), body)()
    return beside


def plan_reader(plugin: type[Plugin]) -> Any:
    """A do-nothing plugin whose ``plan`` holds what ``plugin`` counted for the first ``scheduler.step`` call of each step."""
    plan: list[dict[str, int]] = []
    before: dict[str, int] = {}

    def step(self: Plugin, call: Any, next: Any) -> Any:
        now = {key: sum(branches.values()) for key, branches in call.run.report.plugins[plugin.name].counts.items()}
        if call.step.stage == 0:
            plan.append({key: n - before.get(key, 0) for key, n in now.items() if n != before.get(key, 0)})
        before.update(now)
        return next(call)

    reader: Any = neighbour(plugin, "plan_reader", ["step"], lambda point: step)
    reader.plan = plan
    return reader


def _given(call: Any) -> tuple[Any, ...]:
    return (call.args, call.kwargs, getattr(call, "branches", None), getattr(call, "combined", None))


def _outer(ledger: Ledger, point: str) -> Any:
    def outer(self: Plugin, call: Any, next: Any) -> Any:
        ledger.enter(*_given(call))
        try:
            result = next(call)
            ledger.verify(point)
        finally:
            ledger.frames.pop()
        return result

    return outer


def _inner(ledger: Ledger, point: str) -> Any:
    def inner(self: Plugin, call: Any, next: Any) -> Any:
        ledger.verify(point)
        result = next(call)
        ledger.renew(result)
        return result

    return inner


class FirstLatents(Plugin):
    """Innermost, for plugins that choose where a run begins: ``seen[0]`` is what the last run's first denoiser call was given."""

    name = "watch"
    paper = Paper("none", "", "watches")
    families = ("*",)
    neutral: ClassVar[dict[str, Any]] = {}
    effects = Effects(edits=frozenset({"latents"}))
    seen: ClassVar[list[Tensor]] = []

    def denoise(self, call: Any, next: Any) -> Tensor:
        if call.step.call == 0:
            self.seen[:] = [call.latents.clone()]
        return next(call)  # type: ignore[no-any-return]
