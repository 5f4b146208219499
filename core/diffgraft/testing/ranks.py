"""Two ranks of one denoiser, one after the other in this process: what the first decided by its data, the second must do by other data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.kernel.ranks import STAND_IN
from diffgraft.testing.case import check
from diffgraft.testing.runs import on_leaves
from diffgraft.testing.subject import Subject
from diffgraft.testing.tiny import denoisers

FACTOR = 30.0
"""By how much at most the outputs of the second rank's layers are larger or smaller."""


@contextlib.contextmanager
def seen(models: list[nn.Module], wild: bool) -> Iterator[list[str]]:
    """The layers that run, in order; ``wild``: with outputs that are others at every call, as are those of no two ranks."""
    ran: list[str] = []
    draws = torch.Generator().manual_seed(0)

    def watch(path: str) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            ran.append(path)
            if wild and isinstance(output, Tensor):
                return output * FACTOR ** (2 * torch.rand((), generator=draws).item() - 1)
            return output

        return after

    with on_leaves(models, lambda path, leaf: leaf.register_forward_hook(watch(path))):
        yield ran


@contextlib.contextmanager
def answered(answer: Callable[[Any], Any]) -> Iterator[None]:
    """``call.agree`` in the place of the other ranks."""
    token = STAND_IN.set(answer)
    try:
        yield
    finally:
        STAND_IN.reset(token)


@check("kind")
def ranks_agree(s: Subject) -> None:
    """Ranks that run a denoiser together see other data, and run the same layers: a decision by data goes through ``call.agree``, or they
    wait for each other for ever (vllm-omni #6180, cache-dit #375)."""
    told: list[Any] = []

    def keep(value: Any) -> Any:
        told.append(value)
        return value

    def repeat(value: Any) -> Any:
        assert given, f"the second rank asks for agreement more often than the first ({len(told)} times)"
        return given.pop()

    given: list[Any] = []
    order = []
    for answer, wild in ((keep, False), (repeat, True)):
        given[:] = told[::-1]
        pipe = s.attach(s.make())
        with answered(answer), seen(denoisers(pipe, s.family), wild) as ran:
            s.run(pipe)
        order.append(ran)
    assert not given, f"the second rank asks for agreement {len(told) - len(given)} times, the first {len(told)} times"
    first, second = order
    if first != second:
        at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
        a, b = (names[at] if at < len(names) else "nothing more" for names in order)
        raise AssertionError(f"layer {at} of the first rank is {a}, of a second one with other data {b}: let call.agree decide")
