"""A compiled denoiser. That every way of compiling works (in place, block by block) is proved once, in the core's own tests."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed import registry
from diffgraft.installed.family import Family
from diffgraft.testing.case import check
from diffgraft.testing.runs import call
from diffgraft.testing.setting import USUAL
from diffgraft.testing.subject import Subject
from diffgraft.testing.tiny import tiny

COMPILED = ("sd", "dit", "flux")
"""One family of each kind is compiled: a U-Net, a DiT with batched and one with sequential guidance (tracing takes seconds)."""


def is_compiled(s: Subject) -> bool:
    """Whether this family stands for its kind."""
    claimed = [f for f in registry.families().values() if f.tiny is not None and s.plugin.claims(f) and f.kind == s.family.kind]
    return s.family.name in COMPILED or (s.family is claimed[0] and not any(f.name in COMPILED for f in claimed))


Way = Callable[[Any, Any], Any]
"""Compiles a denoiser with a backend: gives what takes its place, or None where it was compiled in place."""


def whole(module: Any, backend: Any) -> Any:
    """``torch.compile(denoiser)``."""
    return torch.compile(module, backend=backend)


class Tracing:
    """What dynamo did since it was reset: how many graphs it handed to ``backend``, which runs them as they are; where it broke one."""

    def __init__(self) -> None:
        self.graphs = 0

    def backend(self, graph: Any, examples: Any) -> Any:
        self.graphs += 1
        return graph.forward

    @property
    def breaks(self) -> int:
        """How often dynamo came to what it may not trace: it ends the graph there, or, within a loop, leaves the whole frame to Python."""
        counters = torch._dynamo.utils.counters
        return sum(sum(counters[kind].values()) for kind in ("graph_break", "unimplemented"))


@contextlib.contextmanager
def tracing() -> Iterator[Tracing]:
    """A dynamo that has compiled nothing yet, before and after."""
    log = logging.getLogger("torch.__trace")  # under pytest it formats a record for every node
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        log.disabled = True
        yield Tracing()
    finally:
        log.disabled = False
        torch._dynamo.reset()


def run_compiled(pipe: Any, family: Family, way: Way, run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What ``run`` gives with the denoisers of ``pipe`` compiled in this way, and into how many graphs."""
    with tracing() as made:
        for name in family.denoisers:
            if (module := getattr(pipe, name, None)) is not None and (new := way(module, made.backend)) is not None:
                setattr(pipe, name, new)
        return run(), made.graphs


def expect_as_eager(s: Subject, pipe: Any, output: Tensor, how: str) -> None:
    """The same picture, and the same hooks fired, as without compiling."""
    s.expect_near(output, s.fresh().output, 1e-4, f"{how}, against eager")
    assert s.report(pipe).fired == s.fresh().report.fired, f"{how} it fired {s.report(pipe).fired}, eager {s.fresh().report.fired}"


@functools.cache
def plain_graphs(family: Family, class_name: str) -> int:
    """Into how many graphs the plain denoisers of a tiny pipeline are compiled."""
    pipe = tiny(family, class_name).pipe
    return run_compiled(pipe, family, whole, lambda: call(pipe, family, class_name, USUAL))[1]


@check("main", when=is_compiled)
def compiled(s: Subject) -> None:
    """``torch.compile`` of the denoiser: same picture, plugin fires; graphs counted beside the plain one's (DeepCache #26, tomesd #47)."""
    pipe = s.attach(s.make())
    output, graphs = run_compiled(pipe, s.family, whole, lambda: s.run(pipe))
    s.note(f"compiled into {graphs} graphs, the plain denoiser into {plain_graphs(s.family, s.class_name)}")
    expect_as_eager(s, pipe, output, "compiled")
